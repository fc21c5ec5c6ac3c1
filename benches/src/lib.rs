//! Tables and ids to time: made once, ids in rotation, so that no call finds the rows of the one before it in a cache.

use dlrm_core::optimizers::{Kind, Optimizer, Step};
use dlrm_core::{
    Bags, Context, Feature, Gradient, Ids, Offsets, Output, Pooling, Result, RowFormat, TableSet, TableSpec,
};

/// Batches of ids in rotation.
const BATCHES: usize = 8;

/// Tables of one size, each with one feature.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// How many tables.
    pub tables: usize,
    /// Rows of each.
    pub rows: usize,
    /// Elements of a row.
    pub dim: usize,
    /// How rows are stored.
    pub format: RowFormat,
    /// Ids in every bag.
    pub ids_per_bag: usize,
    /// Bags of every feature.
    pub batch: usize,
}

impl Sizes {
    /// Ids in a call.
    #[must_use]
    pub const fn ids(&self) -> usize {
        self.tables * self.batch * self.ids_per_bag
    }

    /// Bytes of the rows that a call reads.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.ids() * self.format.row_bytes(self.dim)
    }
}

/// Tables of zeros, uniform ids, and a place for the output.
pub struct Workload {
    sizes: Sizes,
    set: TableSet,
    batches: Vec<Vec<i64>>,
    next: usize,
    out: Vec<f32>,
}

impl Workload {
    /// Makes the tables and draws the ids.
    ///
    /// # Panics
    /// When there is not enough memory.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        Self::with_padding(sizes, None)
    }

    /// The same, of features that leave an id out of every bag.
    ///
    /// # Panics
    /// When there is not enough memory.
    #[must_use]
    pub fn with_padding(sizes: Sizes, padding: Option<usize>) -> Self {
        let spec = |table| TableSpec {
            name: format!("t{table}"),
            rows: sizes.rows,
            dim: sizes.dim,
            format: sizes.format,
        };
        let feature = |table| Feature { table, pooling: Pooling::Sum, padding };
        let specs = (0..sizes.tables).map(spec).collect();
        let features = (0..sizes.tables).map(feature).collect();
        let set = TableSet::new(specs, features, &Context::default()).expect("memory for the tables");
        let batch = |k: usize| {
            (0..sizes.ids()).map(|i| (scramble(k * sizes.ids() + i) % sizes.rows as u64) as i64).collect()
        };
        let batches = (0..BATCHES).map(batch).collect();
        // Elements that differ, as rows of codes are fitted to them when they are updated.
        let outputs = sizes.batch * sizes.tables * sizes.dim;
        let out = (0..outputs).map(|i| (scramble(i) % 2048) as f32 * 1e-6).collect();
        Self { sizes, set, batches, next: 0, out }
    }

    /// Looks the next batch up.
    pub fn lookup(&mut self, ctx: &Context) -> Result<()> {
        self.next = (self.next + 1) % BATCHES;
        let Sizes { tables, batch, .. } = self.sizes;
        let bags = Bags::new(Ids::I64(&self.batches[self.next]), Offsets::Even, tables, batch, None)?;
        self.set.lookup(&bags, Output::Fp32(&mut self.out), None, ctx)
    }

    /// Gives the tables an optimizer, for [`Workload::update`].
    pub fn set_optimizer(&self, kind: Kind, ctx: &Context) -> Result<()> {
        self.set.set_optimizer(kind, false, RowFormat::Fp32, ctx)
    }

    /// Updates the rows of the next batch, from a gradient of what was looked up last.
    pub fn update(&mut self, optimizer: &Optimizer, ctx: &Context) -> Result<()> {
        self.next = (self.next + 1) % BATCHES;
        let Sizes { tables, batch, .. } = self.sizes;
        let bags = Bags::new(Ids::I64(&self.batches[self.next]), Offsets::Even, tables, batch, None)?;
        let trainable = vec![true; tables];
        let gradient = Gradient {
            output: &self.out,
            argmax: None,
            trainable: &trainable,
            scale_by_frequency: &vec![false; tables],
            factor: 1.0,
        };
        self.set.update(&bags, &gradient, &vec![*optimizer; tables], ctx)
    }

    /// Touches the rows of the next batch: what [`Workload::lookup`] cannot be faster than.
    pub fn touch(&mut self, ctx: &Context) -> Result<u64> {
        self.next = (self.next + 1) % BATCHES;
        let Sizes { tables, batch, .. } = self.sizes;
        let bags = Bags::new(Ids::I64(&self.batches[self.next]), Offsets::Even, tables, batch, None)?;
        self.set.touch(&bags, ctx)
    }
}

/// An optimizer without clipping and decay.
///
/// # Panics
/// When the optimizer has come to want other values.
#[must_use]
pub fn optimizer(kind: Kind) -> Optimizer {
    let value = |name: &&str| match *name {
        "clip_norm" | "clip_value" | "max_norm" => f64::INFINITY,
        "nesterov" | "weight_decay" | "decoupled_weight_decay" => 0.0,
        _ => 1e-4,
    };
    let values: Vec<_> = kind.hyperparameters().iter().map(value).collect();
    Optimizer::new(kind, &values, Step { number: 1, seed: 0 }).expect("values that can be")
}

/// A number without order: `SplitMix64`, by Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
/// OOPSLA 2014.
fn scramble(i: usize) -> u64 {
    let mut z = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_can_be_looked_up_and_touched() {
        for format in RowFormat::ALL {
            let sizes = Sizes { tables: 3, rows: 100, dim: 24, format, ids_per_bag: 2, batch: 5 };
            let mut workload = Workload::new(sizes);
            for _ in 0..2 * BATCHES {
                workload.lookup(&Context::default()).unwrap();
                assert_eq!(workload.touch(&Context::default()), Ok(0));
            }
            assert_eq!(sizes.bytes(), 30 * format.row_bytes(24));
        }
    }
}
