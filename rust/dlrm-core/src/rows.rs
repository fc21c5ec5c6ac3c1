//! How kernels read the rows of a table, whatever its format.
//!
//! A new row format is a type here, a name in `row_format`, and an arm in [`with_rows`].

use crate::kernels::{LANES, Simd, sum};

/// The rows of a table as a kernel reads them.
pub(crate) trait Rows: Copy + Send + Sync {
    /// Elements of a row.
    fn dim(self) -> usize;

    /// `COUNT` vectors of `row`, from element `at` on: all inside the row when `WHOLE`; else one, cut at the row's end.
    fn load<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
    ) -> [S::V; COUNT];

    /// One vector of `row`, from element `at` on, as far as the row reaches.
    #[inline(always)]
    fn load_at<S: Simd>(self, simd: S, row: usize, at: usize) -> S::V {
        let [v] = if at + LANES <= self.dim() {
            self.load::<S, 1, true>(simd, row, at)
        } else {
            self.load::<S, 1, false>(simd, row, at)
        };
        v
    }

    /// Starts to bring all of `row` near; `row` may be any number.
    fn prefetch<S: Simd>(self, simd: S, row: u64);

    /// Writes all of `row` to `out`.
    fn copy<S: Simd>(self, simd: S, row: usize, out: &mut [f32]);
}

/// Rows of format fp32.
#[derive(Clone, Copy)]
pub(crate) struct Fp32Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) dim: usize,
}

impl Rows for Fp32Rows<'_> {
    #[inline(always)]
    fn dim(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn load<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
    ) -> [S::V; COUNT] {
        sum::load::<S, COUNT, WHOLE>(simd, &self.data[row * self.dim..][..self.dim], at)
    }

    #[inline(always)]
    fn prefetch<S: Simd>(self, simd: S, row: u64) {
        let at = (row as usize).wrapping_mul(self.dim);
        simd.prefetch_row(self.data.as_ptr().wrapping_add(at), self.dim);
    }

    #[inline(always)]
    fn copy<S: Simd>(self, _simd: S, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.data[row * self.dim..][..self.dim]);
    }
}

/// Runs `$body` with `$rows` the rows of `$table`, whatever its format.
macro_rules! with_rows {
    ($table:expr, |$rows:ident| $body:expr) => {{
        let table: &$crate::table::Table = $table;
        match table.spec.format {
            $crate::RowFormat::Fp32 => {
                let $rows = $crate::rows::Fp32Rows { data: table.weights.as_slice(), dim: table.spec.dim };
                $body
            }
        }
    }};
}
pub(crate) use with_rows;
