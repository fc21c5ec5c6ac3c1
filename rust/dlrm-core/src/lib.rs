//! Embedding tables in host memory: stored, looked up and trained on all cores.
//!
//! A [`TableSet`] owns tables and the [`Feature`]s that look them up. One call looks up every feature
//! ([`TableSet::lookup`]); one call sums the gradients of the touched rows and runs an optimizer on them
//! ([`TableSet::update`]). This crate knows nothing of Python or torch.
//!
//! Every result has the same bits at every [`Level`] and for every number of threads (of a NaN, that it is one).
//!
//! ```
//! use dlrm_core::{Bags, Context, Feature, Ids, Offsets, Output, Pooling, RowFormat, TableSet, TableSpec};
//!
//! let ctx = Context::default();
//! let spec = TableSpec { name: "ads".into(), rows: 4, dim: 2, format: RowFormat::Fp32 };
//! let feature = Feature { table: 0, pooling: Pooling::Sum, padding: None };
//! let set = TableSet::new(vec![spec], vec![feature], &ctx)?;
//! set.write(0, |rows| rows.copy_from_slice(&[0., 0., 1., 10., 2., 20., 3., 30.]))?;
//!
//! let bags = Bags::new(Ids::I64(&[1, 3, 2]), Offsets::I64(&[0, 2]), 1, 2, None)?;
//! let mut out = [0.0; 4];
//! set.lookup(&bags, Output::Fp32(&mut out), None, &ctx)?;
//! assert_eq!(out, [4., 40., 2., 20.]); // rows 1 + 3, row 2
//! # Ok::<(), dlrm_core::Error>(())
//! ```

mod bags;
mod cache;
mod clip;
mod codebook;
mod context;
mod disjoint;
mod encode;
mod error;
mod float_environment;
mod fork;
mod gradient;
mod guarded;
mod hot;
mod kernels;
mod level;
mod lookup;
mod mapping;
mod memory;
mod named;
mod occurrences;
pub mod optimizers;
mod overlap;
mod own_bags;
mod packed;
mod per_feature;
mod pieces;
mod prepared;
mod renorm;
mod row_filter;
mod row_format;
mod rows;
mod scales;
mod sides;
mod sources;
mod spare;
mod table;
mod table_rows;
mod table_set;
pub mod team;
pub mod threads;
mod touch;
mod update;
mod weights;

pub use bags::{Bags, Ids, Offsets};
pub use cache::{CacheParts, WAYS};
pub use context::Context;
pub use encode::{Encoded, Encoding, Method, RowErrors};
pub use error::{Error, Result};
pub use gradient::{Gradient, SparseRows};
pub use level::Level;
pub use lookup::{Output, Pooling};
pub use memory::{Borrowed, Keeper};
pub use overlap::{Overlap, Part};
pub use packed::Layout;
pub use prepared::Prepared;
pub use row_format::RowFormat;
pub use scales::ScaleFormat;
pub use spare::Spare;
pub use table::{TableMemory, TableSpec};
pub use table_rows::TableRows;
pub use table_set::{Feature, TableSet};
