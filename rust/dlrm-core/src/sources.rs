//! Where the gradient of every id of a call comes from.

use std::ops::Range;

use crate::bags::{Bags, count, with_ids};
use crate::disjoint::Disjoint;
use crate::lookup::Pooling;
use crate::memory::zeros;
use crate::occurrences::Source;
use crate::pieces::{self, Size};
use crate::table_set::{Slot, TableSet};
use crate::{Context, Result};

/// Where the gradient of every id comes from: what there is to know of an occurrence's [`Source`].
#[derive(Clone, Copy)]
pub(crate) struct Sources<'a> {
    pub(crate) grad: &'a [f32],
    /// First element of the output row that the id went into; none where the source itself is that, and then the rest is
    /// none either.
    starts: Option<&'a [usize]>,
    /// By what that row's gradient is multiplied.
    pub(crate) scales: Option<&'a [f32]>,
    pub(crate) argmax: Option<&'a [f32]>,
    /// The id's place in its bag where that is pooled by max, else -1.
    pub(crate) places: Option<&'a [i32]>,
}

/// What of [`Sources`] is known before the gradient is; indexed by the place in `indices`.
#[derive(Default)]
pub(crate) struct Routes {
    starts: Option<Vec<usize>>,
    scales: Option<Vec<f32>>,
    places: Option<Vec<i32>>,
}

/// The part of [`Routes`] that is one piece's.
struct Part<'a> {
    starts: &'a mut [usize],
    scales: Option<&'a mut [f32]>,
    places: Option<&'a mut [i32]>,
}

impl Sources<'_> {
    /// No gradient at all, for a rule that needs none.
    pub(crate) const fn none() -> Self {
        Self { grad: &[], starts: None, scales: None, argmax: None, places: None }
    }

    /// The first element of the output row that the id of a source went into.
    #[inline(always)]
    pub(crate) fn start(&self, source: usize) -> usize {
        self.starts.map_or(source, |starts| starts[source])
    }
}

impl Routes {
    /// What occurrences have to tell of the gradients of a call.
    pub(crate) fn source(set: &TableSet, bags: &Bags) -> Source {
        if is_scaled(set, bags) || set.pools_by_max() { Source::Place } else { Source::Start }
    }

    /// Those of a call; none where occurrences tell all.
    pub(crate) fn new(set: &TableSet, bags: &Bags, source: Source, ctx: &Context) -> Result<Self> {
        const WHAT: &str = "the sources of gradients";
        if source == Source::Start {
            return Ok(Self::default());
        }
        let ids = bags.len();
        let scaled = is_scaled(set, bags);
        let mut starts = zeros(ids, WHAT)?;
        let mut scales = scaled.then(|| zeros(ids, WHAT)).transpose()?;
        let mut places = set.pools_by_max().then(|| zeros(ids, WHAT)).transpose()?;
        {
            let starts = Disjoint::new(&mut starts);
            let scales = scales.as_mut().map(|s| Disjoint::new(s));
            let places = places.as_mut().map(|p| Disjoint::new(p));
            let slots = set.slots(bags);
            pieces::for_each(ctx, &sizes(set, bags), |f, units| {
                let first = bags.feature_bounds(f).start;
                let positions = first + units.start..first + units.end;
                #[expect(unsafe_code, reason = "pieces are disjoint")]
                // SAFETY: features have different ids, and pieces different units: no position is in two of them.
                let part = unsafe {
                    Part {
                        starts: starts.piece(positions.clone()),
                        scales: scales.as_ref().map(|s| s.piece(positions.clone())),
                        places: places.as_ref().map(|p| p.piece(positions.clone())),
                    }
                };
                part.fill(set, bags, f, slots[f], positions);
            })?;
        }
        Ok(Self { starts: Some(starts), scales, places })
    }

    /// With the gradient of a lookup's output, and its `argmax` when a feature pools by max.
    pub(crate) fn sources<'a>(&'a self, grad: &'a [f32], argmax: Option<&'a [f32]>) -> Sources<'a> {
        let (starts, scales) = (self.starts.as_deref(), self.scales.as_deref());
        Sources { grad, starts, scales, argmax, places: self.places.as_deref() }
    }
}

impl Part<'_> {
    fn fill(mut self, set: &TableSet, bags: &Bags, f: usize, slot: Slot, positions: Range<usize>) {
        if let Some(scales) = &mut self.scales {
            match bags.weights {
                Some(weights) => scales.copy_from_slice(&weights[positions.clone()]),
                None => scales.fill(1.0),
            }
        }
        if let Some(places) = &mut self.places {
            places.fill(-1);
        }
        if !set.pooled {
            let first = bags.feature_bounds(f).start;
            for (start, position) in self.starts.iter_mut().zip(positions) {
                *start = slot.at(position - first);
            }
            return;
        }
        let before = positions.start;
        bags.for_each_bag(positions, |bag, ids| {
            let own = ids.start - before..ids.end - before;
            self.starts[own.clone()].fill(slot.at(bags.unit(f, bag)));
            match set.features[f].pooling {
                Pooling::Mean => self.divide(own, set.ids_of_bag(bags, f, bag)),
                Pooling::Max => self.number(own, ids.start - bags.bounds(bag).start),
                _ => {}
            }
        });
    }

    fn divide(&mut self, own: Range<usize>, by: f32) {
        for scale in self.scales.iter_mut().flat_map(|scales| &mut scales[own.clone()]) {
            *scale /= by;
        }
    }

    fn number(&mut self, own: Range<usize>, from: usize) {
        let places = self.places.iter_mut().flat_map(|places| &mut places[own.clone()]);
        for (i, place) in (from as i32..).zip(places) {
            *place = i;
        }
    }
}

impl TableSet {
    /// Whether any feature does.
    pub(crate) fn pools_by_max(&self) -> bool {
        self.features.iter().any(|f| f.pooling == Pooling::Max)
    }

    /// How many ids of a bag are not padding, at least 1: by what a mean divides.
    pub(crate) fn ids_of_bag(&self, bags: &Bags, feature: usize, bag: usize) -> f32 {
        let padding = self.features[feature].padding.map_or(u64::MAX, |p| p as u64);
        let count = with_ids!(bags.ids, |ids| count(&ids[bags.bounds(bag)], padding));
        count.max(1) as f32
    }
}

/// Whether the gradients of ids are multiplied by anything.
fn is_scaled(set: &TableSet, bags: &Bags) -> bool {
    bags.weights.is_some() || set.features.iter().any(|f| f.pooling == Pooling::Mean)
}

/// Units are ids, and each takes 8 to 16 bytes.
fn sizes(set: &TableSet, bags: &Bags) -> Vec<Size> {
    let size = |f| {
        let units = bags.feature_bounds(f).len();
        Size { units, lines: units.div_ceil(4) }
    };
    (0..set.features.len()).map(size).collect()
}
