//! Bags of one feature whose ids have been copied side by side.

use std::ops::Range;

use crate::Result;
use crate::bags::{Bags, Id, Ids, Offsets};

/// Copied bags.
pub(crate) struct OwnBags {
    pub(crate) ids: Vec<i64>,
    /// Where each begins, and where the last ends; none where each has one id.
    offsets: Option<Vec<i64>>,
    weights: Option<Vec<f32>>,
}

impl OwnBags {
    /// Bags from where one of `starts` is to where the next is, without the ids that are `padding`.
    pub(crate) fn without<I: Id>(padding: u64, starts: &[usize], ids: &[I], weights: Option<&[f32]>) -> Self {
        let all = starts[0]..starts[starts.len() - 1];
        let is_kept = |&position: &usize| ids[position].row() != padding;
        let (mut own, mut offsets) = (Vec::with_capacity(all.len()), Vec::with_capacity(starts.len()));
        offsets.push(0);
        for bag in starts.windows(2) {
            own.extend((bag[0]..bag[1]).filter(is_kept).map(|position| ids[position].row() as i64));
            offsets.push(own.len() as i64);
        }
        let weights = weights.map(|weights| {
            let mut own_weights = Vec::with_capacity(own.len());
            own_weights.extend(all.filter(is_kept).map(|position| weights[position]));
            own_weights
        });
        Self { ids: own, offsets: Some(offsets), weights }
    }

    /// Those of the output rows `rows`, of bags of one id each.
    pub(crate) fn of_one_id<I: Id>(rows: &[usize], ids: &[I], weights: Option<&[f32]>) -> Self {
        let ids = rows.iter().map(|&row| ids[row].row() as i64).collect();
        let weights = weights.map(|all| rows.iter().map(|&row| all[row]).collect());
        Self { ids, offsets: None, weights }
    }

    /// Those of the output rows `rows`, of all bags' `starts`.
    pub(crate) fn of_rows<I: Id>(
        rows: &[usize],
        starts: &[usize],
        ids: &[I],
        weights: Option<&[f32]>,
    ) -> Self {
        let bag = |&row: &usize| -> Range<usize> { starts[row]..starts[row + 1] };
        let len = rows.iter().map(|row| bag(row).len()).sum();
        let (mut own, mut offsets) = (Vec::with_capacity(len), Vec::with_capacity(rows.len() + 1));
        offsets.push(0);
        for row in rows {
            own.extend(ids[bag(row)].iter().map(|id| id.row() as i64));
            offsets.push(own.len() as i64);
        }
        let weights = weights.map(|all| rows.iter().flat_map(|row| &all[bag(row)]).copied().collect());
        Self { ids: own, offsets: Some(offsets), weights }
    }

    /// All of them.
    pub(crate) fn bags(&self) -> Result<Bags<'_>> {
        let (ids, weights) = (Ids::I64(&self.ids), self.weights.as_deref());
        match &self.offsets {
            Some(offsets) => Bags::new(ids, Offsets::I64(offsets), 1, offsets.len() - 1, weights),
            None => Bags::new(ids, Offsets::Even, 1, ids.len(), weights),
        }
    }
}
