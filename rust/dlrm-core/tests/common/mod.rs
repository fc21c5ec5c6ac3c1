//! Random calls, and what they must give, computed in float64 one element after another.

#![allow(dead_code, reason = "every test file uses its part")]

pub(crate) mod formulas;

use dlrm_core::{Bags, Context, Feature, Ids, Level, Offsets, Pooling, RowFormat, TableSet, TableSpec};
use proptest::prelude::*;

/// Astride every vector width and block.
pub(crate) const DIMS: [usize; 20] =
    [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 130, 257];

/// One call on one set of tables.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Rows and dim of each table.
    pub(crate) tables: Vec<(usize, usize)>,
    pub(crate) features: Vec<Feature>,
    pub(crate) batch: usize,
    /// Ids of each bag, feature-major.
    pub(crate) bags: Vec<Vec<i64>>,
    pub(crate) weighted: bool,
    pub(crate) wide_ids: bool,
    pub(crate) last_offset: bool,
    pub(crate) seed: u64,
}

/// A number in [-1, 1), the same for the same arguments.
pub(crate) fn noise(seed: u64, i: usize) -> f32 {
    let mut x = (seed << 32 ^ i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((x >> 40) as f32 / (1 << 23) as f32) - 1.0
}

fn any_feature(tables: Vec<(usize, usize)>, pooled: bool) -> impl Strategy<Value = Feature> {
    let pooling = if pooled {
        prop_oneof![Just(Pooling::Sum), Just(Pooling::Mean), Just(Pooling::Max)].boxed()
    } else {
        Just(Pooling::None).boxed()
    };
    (0..tables.len(), pooling, prop::option::of(0_usize..1000)).prop_map(move |(table, pooling, padding)| {
        Feature { table, pooling, padding: padding.map(|p| p % tables[table].0) }
    })
}

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let table = (1_usize..20, prop::sample::select(&DIMS[..]));
    (prop::collection::vec(table, 1..4), any::<bool>(), 0_usize..6, 1_usize..5)
        .prop_flat_map(|(tables, pooled, batch, features)| {
            let features = prop::collection::vec(any_feature(tables.clone(), pooled), features);
            (Just(tables), features, Just(batch))
        })
        .prop_flat_map(|(tables, features, batch)| {
            let bags: Vec<_> = features
                .iter()
                .flat_map(|f| {
                    let rows = tables[f.table].0 as i64;
                    (0..batch).map(move |_| prop::collection::vec(0..rows, 0..7))
                })
                .collect();
            (Just((tables, features, batch)), bags, any::<[bool; 3]>(), any::<u64>())
        })
        .prop_map(|((tables, features, batch), bags, [weighted, wide_ids, last_offset], seed)| {
            let weighable = |f: &Feature| matches!(f.pooling, Pooling::Sum | Pooling::Mean);
            let weighted = weighted && features.iter().all(weighable);
            Case { tables, features, batch, bags, weighted, wide_ids, last_offset, seed }
        })
}

/// A case large enough to run on several threads, with hot rows.
pub(crate) fn large_case(pooling: Pooling) -> Case {
    let tables = vec![(5000, 64), (3, 33), (700, 128)];
    let batch = 3000;
    let features: Vec<_> =
        [0, 1, 2, 0].into_iter().map(|table| Feature { table, pooling, padding: Some(2) }).collect();
    let bag = |i: usize| {
        let rows = tables[features[i / batch].table].0;
        let id = |k: usize| ((noise(7, i * 64 + k).abs().powi(3) * rows as f32) as i64).min(rows as i64 - 1);
        (0..i * 7 % 10).map(id).collect()
    };
    let bags = (0..features.len() * batch).map(bag).collect();
    let weighted = matches!(pooling, Pooling::Sum | Pooling::Mean);
    Case { tables, features, batch, bags, weighted, wide_ids: true, last_offset: true, seed: 3 }
}

/// The same where an occurrence tells all of its gradient: sums without weights, of many ids and of one id each.
pub(crate) fn plain_cases() -> [Case; 2] {
    let many = Case { weighted: false, ..large_case(Pooling::Sum) };
    let last = |bag: &Vec<i64>| vec![bag.last().map_or(1, |&id| id)];
    let one = Case { bags: many.bags.iter().map(last).collect(), ..many.clone() };
    [many, one]
}

/// The arrays of a call.
pub(crate) struct Arrays {
    pub(crate) narrow: Vec<i32>,
    pub(crate) wide: Vec<i64>,
    pub(crate) offsets: Vec<i64>,
    pub(crate) weights: Option<Vec<f32>>,
}

impl Case {
    pub(crate) fn pooled(&self) -> bool {
        self.features[0].pooling != Pooling::None
    }

    pub(crate) fn arrays(&self) -> Arrays {
        let wide: Vec<i64> = self.bags.concat();
        let mut offsets = vec![0];
        for bag in &self.bags {
            offsets.push(offsets[offsets.len() - 1] + bag.len() as i64);
        }
        offsets.truncate(self.bags.len() + usize::from(self.last_offset));
        let weights = self.weighted.then(|| (0..wide.len()).map(|i| noise(self.seed ^ 1, i)).collect());
        Arrays { narrow: wide.iter().map(|&id| id as i32).collect(), wide, offsets, weights }
    }

    pub(crate) fn call<'a>(&self, arrays: &'a Arrays) -> Bags<'a> {
        let ids = if self.wide_ids { Ids::I64(&arrays.wide) } else { Ids::I32(&arrays.narrow) };
        let offsets = Offsets::I64(&arrays.offsets);
        Bags::new(ids, offsets, self.features.len(), self.batch, arrays.weights.as_deref()).unwrap()
    }

    pub(crate) fn weight(&self, table: usize, row: usize, c: usize) -> f32 {
        noise(self.seed ^ 2, (table * 1000 + row) * 1000 + c)
    }

    /// The tables, filled.
    pub(crate) fn set(&self, ctx: &Context) -> TableSet {
        let spec = |(t, &(rows, dim)): (usize, &(usize, usize))| TableSpec {
            name: format!("t{t}"),
            rows,
            dim,
            format: RowFormat::Fp32,
        };
        let specs = self.tables.iter().enumerate().map(spec).collect();
        let set = TableSet::new(specs, self.features.clone(), ctx).unwrap();
        for (t, &(_, dim)) in self.tables.iter().enumerate() {
            set.write(t, |data| {
                for (i, x) in data.iter_mut().enumerate() {
                    *x = self.weight(t, i / dim, i % dim);
                }
            })
            .unwrap();
        }
        set
    }

    /// For every output row in the order of the output: its feature, and the place and id of each of its ids.
    pub(crate) fn output_rows(&self) -> Vec<(usize, Vec<(usize, usize)>)> {
        let mut places = 0..;
        let mut place = |&id: &i64| (places.next().expect("endless"), id as usize);
        let bags: Vec<Vec<_>> = self.bags.iter().map(|bag| bag.iter().map(&mut place).collect()).collect();
        let feature = |i: usize| i / self.batch;
        if !self.pooled() {
            let ids = bags.into_iter().enumerate();
            return ids.flat_map(|(i, bag)| bag.into_iter().map(move |id| (feature(i), vec![id]))).collect();
        }
        let order = (0..self.batch).flat_map(|b| (0..self.features.len()).map(move |f| f * self.batch + b));
        order.map(|i| (feature(i), bags[i].clone())).collect()
    }

    /// The ids of an output row that count, each with its factor.
    pub(crate) fn terms(
        &self,
        arrays: &Arrays,
        feature: usize,
        ids: &[(usize, usize)],
    ) -> Vec<(usize, usize, f64)> {
        let Feature { pooling, padding, .. } = self.features[feature];
        let counted: Vec<_> =
            ids.iter().filter(|(_, id)| pooling == Pooling::None || Some(*id) != padding).collect();
        let n = if pooling == Pooling::Mean { counted.len().max(1) as f64 } else { 1.0 };
        let weight = |place: usize| arrays.weights.as_ref().map_or(1.0, |w| f64::from(w[place]));
        counted.into_iter().map(|&(place, id)| (place, id, weight(place) / n)).collect()
    }

    /// The output of a lookup.
    pub(crate) fn expected_output(&self, arrays: &Arrays) -> Vec<f64> {
        let mut out = Vec::new();
        for (f, ids) in self.output_rows() {
            let Feature { table, pooling, .. } = self.features[f];
            let terms = self.terms(arrays, f, &ids);
            for c in 0..self.tables[table].1 {
                let values = terms.iter().map(|&(_, id, w)| w * f64::from(self.weight(table, id, c)));
                out.push(match pooling {
                    Pooling::Max => values.reduce(f64::max).unwrap_or(0.0),
                    _ => values.sum(),
                });
            }
        }
        out
    }
}

/// Every level on 1, 2, 3 and 8 threads.
pub(crate) fn contexts() -> Vec<Context<'static>> {
    let with = |level| [1, 2, 3, 8].map(|threads| Context { level, threads, ..Context::default() });
    Level::available().flat_map(with).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
pub(crate) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(g) - e).abs();
        assert!(error <= tolerance * (1.0 + e.abs()), "element {i}: expected {e}, got {g}");
    }
}
