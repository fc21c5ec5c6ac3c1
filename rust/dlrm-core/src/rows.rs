//! How kernels read the rows of a table, whatever its format.
//!
//! A new row format is a type here, a name in `row_format`, and an arm in [`with_rows`].

use bytemuck::{Pod, Zeroable};

use crate::cache::CachedRows;
use crate::kernels::{Kept, LANES, Lanes, Simd, Take, sum};
use crate::scales::Scales;

/// The rows of a table as a kernel reads them.
pub(crate) trait Rows: Copy + Send + Sync {
    /// Elements of a row.
    fn dim(self) -> usize;

    /// The same rows, which are `vectors` vectors long: where that is a constant, it becomes part of the code.
    fn of_vectors(self, vectors: usize) -> Self;

    /// Hands `into` `COUNT` vectors of `row`, with their numbers, from element `at` on: all inside the row when `WHOLE`;
    /// else one, cut at the row's end. `at` is a multiple of [`LANES`].
    fn each<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
        into: &mut impl Take<S>,
    );

    /// One vector of `row`, from element `at` on, as far as the row reaches; the other lanes are zero.
    #[inline(always)]
    fn load_at<S: Simd>(self, simd: S, row: usize, at: usize) -> S::V {
        let mut loaded = Kept(simd.splat(0.0));
        if at + LANES <= self.dim() {
            self.each::<S, 1, true>(simd, row, at, &mut loaded);
        } else {
            self.each::<S, 1, false>(simd, row, at, &mut loaded);
        }
        loaded.0
    }

    /// Starts to bring all of `row` near, which is `COUNT` vectors, or of any length where that is 0; `row` may be any
    /// number.
    fn prefetch<S: Simd, const COUNT: usize>(self, simd: S, row: u64);

    /// Writes all of `row` to `out`.
    #[inline(always)]
    fn copy<S: Simd>(self, simd: S, row: usize, out: &mut [f32]) {
        const COUNT: usize = 4;
        let mut at = 0;
        for out in out.as_chunks_mut::<{ COUNT * LANES }>().0 {
            self.each::<S, COUNT, true>(simd, row, at, &mut Copied(out));
            at += COUNT * LANES;
        }
        while at < out.len() {
            let elements = self.load_at(simd, row, at);
            simd.store_at(out, at, elements);
            at += LANES;
        }
    }
}

/// Where vectors are written one after another.
struct Copied<'a>(&'a mut [f32]);

impl<S: Simd> Take<S> for Copied<'_> {
    #[inline(always)]
    fn take(&mut self, simd: S, i: usize, v: S::V) {
        simd.store_at(self.0, i * LANES, v);
    }
}

/// Hands over the `COUNT` vectors of `row` from element `at` on, or one that is cut at its end.
#[inline(always)]
fn each_fp32<S: Simd, const COUNT: usize, const WHOLE: bool>(
    simd: S,
    row: &[f32],
    at: usize,
    into: &mut impl Take<S>,
) {
    for (i, v) in sum::load::<S, COUNT, WHOLE>(simd, row, at).into_iter().enumerate() {
        into.take(simd, i, v);
    }
}

/// Starts to bring a row near that is `COUNT` times `bytes` long, or, where that is 0, `row_bytes`.
#[inline(always)]
fn prefetch_row<S: Simd, const COUNT: usize>(simd: S, at: *const u8, bytes: usize, row_bytes: usize) {
    if COUNT == 0 {
        return simd.prefetch_bytes(at, row_bytes);
    }
    // Tables begin on a cache line, so rows of such lengths reach into as few lines as they can.
    let mut line = 0;
    while line < COUNT * bytes {
        simd.prefetch(at.wrapping_add(line));
        line += 64;
    }
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
    fn of_vectors(self, vectors: usize) -> Self {
        Self { dim: vectors * LANES, ..self }
    }

    #[inline(always)]
    fn each<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
        into: &mut impl Take<S>,
    ) {
        each_fp32::<S, COUNT, WHOLE>(simd, &self.data[row * self.dim..][..self.dim], at, into);
    }

    #[inline(always)]
    fn prefetch<S: Simd, const COUNT: usize>(self, simd: S, row: u64) {
        let at = (row as usize).wrapping_mul(self.dim);
        let bytes = LANES * size_of::<f32>();
        prefetch_row::<S, COUNT>(
            simd,
            self.data.as_ptr().wrapping_add(at).cast(),
            bytes,
            self.dim * size_of::<f32>(),
        );
    }
}

/// How elements are packed: [`LANES`] of them are a [`Packing::Group`].
pub(crate) trait Packing: Copy + Send + Sync {
    /// What a group is made of.
    type Unit: Pod;
    /// An array of units.
    type Group: Pod;

    /// The numbers of a group.
    fn load<S: Simd>(self, simd: S, group: &Self::Group) -> S::V;

    /// Hands over `scale * number + bias` of each number of `COUNT` groups, rounded after the product and after the sum.
    #[inline(always)]
    fn each_scaled<S: Simd, const COUNT: usize>(
        self,
        simd: S,
        groups: &[Self::Group; COUNT],
        [scale, bias]: [S::V; 2],
        into: &mut impl Take<S>,
    ) {
        for (i, group) in groups.iter().enumerate() {
            into.take(simd, i, simd.add(simd.mul(self.load(simd, group), scale), bias));
            simd.in_turn();
        }
    }

    /// Makes a group; of a quantized format's, the numbers are codes.
    fn store<S: Simd>(self, simd: S, group: &mut Self::Group, numbers: S::V);
}

/// Units of a group.
#[inline(always)]
const fn group_len<P: Packing>() -> usize {
    size_of::<P::Group>() / size_of::<P::Unit>()
}

/// `COUNT` groups of `row`, from element `at` on.
#[inline(always)]
fn groups<P: Packing, const COUNT: usize>(row: &[P::Unit], at: usize) -> &[P::Group; COUNT] {
    let units = &row[at / LANES * group_len::<P>()..][..COUNT * group_len::<P>()];
    bytemuck::cast_slice(units).first_chunk().expect("so many units")
}

/// The group of `row` from element `at` on that is cut at the row's end, filled with zeros.
#[inline(always)]
fn cut_group<P: Packing>(row: &[P::Unit], at: usize) -> P::Group {
    let rest = &row[at / LANES * group_len::<P>()..];
    let mut group = P::Group::zeroed();
    bytemuck::cast_slice_mut(std::slice::from_mut(&mut group))[..rest.len()].copy_from_slice(rest);
    group
}

/// Packs a row; what its last unit has room for beyond the row's end is zero.
#[inline(always)]
pub(crate) fn pack<S: Simd, P: Packing>(simd: S, packing: P, row: &[f32], into: &mut [P::Unit]) {
    pack_mapped(simd, packing, row, into, &mut Same);
}

/// The same, of what `map` makes of the elements.
#[inline(always)]
pub(crate) fn pack_mapped<S: Simd, P: Packing, M: Map<S>>(
    simd: S,
    packing: P,
    row: &[f32],
    into: &mut [P::Unit],
    map: &mut M,
) {
    let (vectors, rest) = row.as_chunks();
    let (whole, cut) = into.split_at_mut(vectors.len() * group_len::<P>());
    let groups: &mut [P::Group] = bytemuck::cast_slice_mut(whole);
    for (vector, group) in vectors.iter().zip(groups) {
        packing.store(simd, group, map.map(simd, simd.load(vector), LANES));
    }
    if !rest.is_empty() {
        let numbers = map.map(simd, simd.load_partial(rest), rest.len());
        let mut group = P::Group::zeroed();
        packing.store(simd, &mut group, simd.first(numbers, rest.len()));
        let units = bytemuck::cast_slice(std::slice::from_ref(&group));
        cut.copy_from_slice(&units[..cut.len()]);
    }
}

/// What becomes of elements before they are packed.
pub(crate) trait Map<S: Simd> {
    /// The first `len` lanes of `x` are a row's, the others zero.
    fn map(&mut self, simd: S, x: S::V, len: usize) -> S::V;
}

/// Nothing.
struct Same;

impl<S: Simd> Map<S> for Same {
    #[inline(always)]
    fn map(&mut self, _simd: S, x: S::V, _len: usize) -> S::V {
        x
    }
}

/// A packing by the operations of a level.
macro_rules! packing {
    ($(#[$doc:meta])* $name:ident, [$unit:ty; $len:expr], $load:ident, $store:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Packing for $name {
            type Unit = $unit;
            type Group = [$unit; $len];

            #[inline(always)]
            fn load<S: Simd>(self, simd: S, group: &Self::Group) -> S::V {
                simd.$load(group)
            }

            #[inline(always)]
            fn store<S: Simd>(self, simd: S, group: &mut Self::Group, numbers: S::V) {
                simd.$store(group, numbers);
            }
        }
    };
}

packing!(
    /// Single precision.
    Fp32, [f32; LANES], load, store
);
packing!(
    /// Half precision.
    Fp16, [u16; LANES], load_fp16, store_fp16
);
packing!(
    /// The upper halves of single precision.
    Bf16, [u16; LANES], load_bf16, store_bf16
);
packing!(
    /// Codes of 8 bits.
    Int8, [u8; LANES], load_int8, store_int8
);
packing!(
    /// Codes of 2 bits.
    Int2, [u8; LANES / 4], load_int2, store_int2
);

/// Codes of 4 bits, into a codebook.
#[derive(Clone, Copy)]
pub(crate) struct Int4<'a>(pub(crate) &'a Lanes);

impl Packing for Int4<'_> {
    type Unit = u8;
    type Group = [u8; LANES / 2];

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, group: &Self::Group) -> S::V {
        let mut chosen = Kept(simd.splat(0.0));
        simd.each_int4(std::array::from_ref(group), simd.load(self.0), &mut chosen);
        chosen.0
    }

    /// A row has but 16 different elements: they are made first, and then chosen from.
    #[inline(always)]
    fn each_scaled<S: Simd, const COUNT: usize>(
        self,
        simd: S,
        groups: &[Self::Group; COUNT],
        [scale, bias]: [S::V; 2],
        into: &mut impl Take<S>,
    ) {
        let elements = simd.add(simd.mul(simd.load(self.0), scale), bias);
        simd.each_int4(groups, elements, into);
    }

    #[inline(always)]
    fn store<S: Simd>(self, simd: S, group: &mut Self::Group, numbers: S::V) {
        simd.store_int4(group, numbers);
    }
}

/// Rows of format fp16 or bf16.
#[derive(Clone, Copy)]
pub(crate) struct HalfRows<'a, P> {
    pub(crate) packing: P,
    pub(crate) data: &'a [u16],
    pub(crate) dim: usize,
}

impl<P: Packing<Unit = u16>> Rows for HalfRows<'_, P> {
    #[inline(always)]
    fn dim(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn of_vectors(self, vectors: usize) -> Self {
        Self { dim: vectors * LANES, ..self }
    }

    #[inline(always)]
    fn each<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
        into: &mut impl Take<S>,
    ) {
        let row = &self.data[row * self.dim..][..self.dim];
        if !WHOLE {
            return into.take(simd, 0, self.packing.load(simd, &cut_group::<P>(row, at)));
        }
        let groups: &[_; COUNT] = groups::<P, COUNT>(row, at);
        for (i, group) in groups.iter().enumerate() {
            into.take(simd, i, self.packing.load(simd, group));
            simd.in_turn();
        }
    }

    #[inline(always)]
    fn prefetch<S: Simd, const COUNT: usize>(self, simd: S, row: u64) {
        let at = (row as usize).wrapping_mul(self.dim);
        let bytes = LANES * size_of::<u16>();
        prefetch_row::<S, COUNT>(
            simd,
            self.data.as_ptr().wrapping_add(at).cast(),
            bytes,
            self.dim * size_of::<u16>(),
        );
    }
}

/// Rows of a quantized format: an element is `scale * code + bias`, rounded after the product and after the sum; those of
/// cached rows are as they are.
///
/// So a pooled row has the same bits as one pooled over the decoded rows.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedRows<'a, P> {
    pub(crate) packing: P,
    pub(crate) codes: &'a [u8],
    pub(crate) scales: Scales<'a>,
    pub(crate) row_bytes: usize,
    pub(crate) dim: usize,
    /// The rows that are not in codes.
    pub(crate) cache: CachedRows<'a>,
}

impl<P: Packing<Unit = u8>> Rows for QuantizedRows<'_, P> {
    #[inline(always)]
    fn dim(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn of_vectors(self, vectors: usize) -> Self {
        Self { dim: vectors * LANES, row_bytes: vectors * size_of::<P::Group>(), ..self }
    }

    #[inline(always)]
    fn each<S: Simd, const COUNT: usize, const WHOLE: bool>(
        self,
        simd: S,
        row: usize,
        at: usize,
        into: &mut impl Take<S>,
    ) {
        let [scale, bias] = self.scales.get(row);
        if scale.is_nan()
            && let Some(cached) = self.cache.get(row, self.scales, self.dim)
        {
            return each_fp32::<S, COUNT, WHOLE>(simd, cached, at, into);
        }
        let codes = &self.codes[row * self.row_bytes..][..self.row_bytes];
        let affine = [simd.splat(scale), simd.splat(bias)];
        if WHOLE {
            return self.packing.each_scaled(simd, groups::<P, COUNT>(codes, at), affine, into);
        }
        let mut loaded = Kept(affine[0]);
        self.packing.each_scaled(simd, &[cut_group::<P>(codes, at)], affine, &mut loaded);
        into.take(simd, 0, simd.first(loaded.0, self.dim - at));
    }

    #[inline(always)]
    fn prefetch<S: Simd, const COUNT: usize>(self, simd: S, row: u64) {
        let row = row as usize;
        let at = row.wrapping_mul(self.row_bytes);
        prefetch_row::<S, COUNT>(
            simd,
            self.codes.as_ptr().wrapping_add(at),
            size_of::<P::Group>(),
            self.row_bytes,
        );
        simd.prefetch(self.scales.address(row));
    }
}

/// Runs `$body` with `$rows` the rows that a [`RowsRef`](crate::table_rows::RowsRef) is of, whatever their format.
macro_rules! with_rows {
    ($rows_ref:expr, |$rows:ident| $body:expr) => {{
        use $crate::rows::{Bf16, Fp16, Int2, Int4, Int8};
        let of: $crate::table_rows::RowsRef = $rows_ref;
        match of.format {
            $crate::RowFormat::Fp32 => {
                let $rows = $crate::rows::Fp32Rows { data: bytemuck::cast_slice(of.elements), dim: of.dim };
                $body
            }
            $crate::RowFormat::Fp16 => {
                let $rows = of.half(Fp16);
                $body
            }
            $crate::RowFormat::Bf16 => {
                let $rows = of.half(Bf16);
                $body
            }
            $crate::RowFormat::Int8 => {
                let $rows = of.quantized(Int8);
                $body
            }
            $crate::RowFormat::Int4 => {
                let $rows = of.quantized(Int4(of.codebook));
                $body
            }
            $crate::RowFormat::Int2 => {
                let $rows = of.quantized(Int2);
                $body
            }
        }
    }};
}
pub(crate) use with_rows;
