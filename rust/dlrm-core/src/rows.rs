//! How kernels read the rows of a table, whatever its format.
//!
//! A new row format is a type here, a name in `row_format`, and an arm in [`with_rows`].

use bytemuck::{Pod, Zeroable};

use crate::cache::CachedRows;
use crate::kernels::{LANES, Lanes, Simd};
use crate::scales::Scales;

/// The rows of a table as a kernel reads them.
pub(crate) trait Rows: Copy + Send + Sync {
    /// How a row's elements are made.
    type Reading: Reading;

    /// Elements of a row.
    fn dim(self) -> usize;

    /// The same rows, which are `vectors` vectors long: where that is a constant, it becomes part of the code.
    fn of_vectors(self, vectors: usize) -> Self;

    /// Rows, to be read, each times its weight if there is one; not of those that are [cached](Self::cached).
    fn open_all<S: Simd, const COUNT: usize>(
        &self,
        simd: S,
        rows: [usize; COUNT],
        weights: [Option<f32>; COUNT],
    ) -> [Row<'_, S, Self::Reading>; COUNT];

    /// One row, likewise.
    #[inline(always)]
    fn open<S: Simd>(&self, simd: S, row: usize, weight: Option<f32>) -> Row<'_, S, Self::Reading> {
        let [row] = self.open_all(simd, [row], [weight]);
        row
    }

    /// Whether there may be rows that are kept in fp32 beside the others.
    fn has_cached(&self) -> bool;

    /// A row, if it is one of those, likewise.
    fn cached<S: Simd>(&self, simd: S, row: usize, weight: Option<f32>) -> Option<Row<'_, S, Plain<Fp32>>>;

    /// Where the bytes of a row are, for prefetching only, and how many; `row` may be any number.
    fn bytes(&self, row: u64) -> (*const u8, usize);

    /// Where a row's scale and bias are, likewise, if it has such.
    fn scale(&self, row: u64) -> Option<*const u8>;

    /// One vector of `row`, from element `at` on, as far as the row reaches; the other lanes are zero.
    fn load_at<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V;

    /// Writes all of `row` to `out`.
    #[inline(always)]
    fn copy<S: Simd>(&self, simd: S, row: usize, out: &mut [f32]) {
        match self.cached(simd, row, None) {
            Some(row) => row.copy(simd, out),
            None => self.open(simd, row, None).copy(simd, out),
        }
    }
}

/// How the elements of a row are made of what is stored: [`LANES`] of them of a [`Reading::Group`].
pub(crate) trait Reading: Copy + Send + Sync {
    /// What a row is made of.
    type Unit: Pod;
    /// An array of units.
    type Group: Pod;
    /// What all elements of a row are made with, in registers.
    type With<S: Simd>: Copy;
    /// Whether two groups at once take less than one after another.
    const IN_PAIRS: bool = false;
    /// Whether rows are added without their [bias](Self::bias), which is the same for all elements.
    const BIASED: bool = false;

    /// The elements of a group, times the row's weight.
    fn load<S: Simd>(self, simd: S, with: Self::With<S>, group: &Self::Group) -> S::V;

    /// The elements of two.
    #[inline(always)]
    fn load_pair<S: Simd>(self, simd: S, with: Self::With<S>, pair: &[Self::Group; 2]) -> [S::V; 2] {
        [self.load(simd, with, &pair[0]), self.load(simd, with, &pair[1])]
    }

    /// Adds the elements of some groups, without the row's bias where that is apart, to `sum`.
    #[inline(always)]
    fn add<S: Simd, const COUNT: usize>(
        self,
        simd: S,
        with: Self::With<S>,
        groups: &[Self::Group; COUNT],
        sum: &mut [S::V; COUNT],
    ) {
        let (pairs, rest) = groups.as_chunks();
        for (i, pair) in pairs.iter().enumerate() {
            let [first, second] = self.load_pair(simd, with, pair);
            sum[2 * i] = simd.add(sum[2 * i], first);
            sum[2 * i + 1] = simd.add(sum[2 * i + 1], second);
        }
        for group in rest {
            sum[COUNT - 1] = simd.add(sum[COUNT - 1], self.load(simd, with, group));
        }
    }

    /// The group of which there is less than a whole one, filled with zeros.
    #[inline(always)]
    fn cut<S: Simd>(self, _simd: S, units: &[Self::Unit]) -> Self::Group {
        filled(units)
    }

    /// What is missing in every element of [`Self::add`].
    #[inline(always)]
    fn bias<S: Simd>(simd: S, _with: Self::With<S>) -> S::V {
        simd.splat(0.0)
    }
}

/// How the elements of a row are made of codes and of the row's scale and bias.
pub(crate) trait CodeReading: Reading<Unit = u8> {
    /// The same for a vector alone.
    type Alone: CodeReading;

    /// For a row of such scale and bias, times a weight if there is one.
    fn with<S: Simd>(self, simd: S, affine: [S::V; 2], weight: Option<S::V>) -> Self::With<S>;

    /// The same for a vector alone.
    fn alone(self) -> Self::Alone;
}

/// A weight in all lanes.
#[inline(always)]
#[expect(clippy::manual_map, reason = "a closure does not get its level's instructions")]
fn splat<S: Simd>(simd: S, weight: Option<f32>) -> Option<S::V> {
    match weight {
        Some(weight) => Some(simd.splat(weight)),
        None => None,
    }
}

/// A vector times a weight, if there is one.
#[inline(always)]
fn weighted<S: Simd>(simd: S, v: S::V, weight: Option<S::V>) -> S::V {
    match weight {
        Some(weight) => simd.mul(v, weight),
        None => v,
    }
}

/// A row that has been found.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, S: Simd, R: Reading> {
    reading: R,
    whole: &'a [R::Group],
    /// What is less than a group.
    cut: &'a [R::Unit],
    with: R::With<S>,
}

impl<'a, S: Simd, R: Reading> Row<'a, S, R> {
    /// A row of `dim` elements.
    #[inline(always)]
    fn new(reading: R, units: &'a [R::Unit], with: R::With<S>, dim: usize) -> Self {
        let group_len = size_of::<R::Group>() / size_of::<R::Unit>();
        let (whole, cut) = units.split_at(dim / LANES * group_len);
        Self { reading, whole: bytemuck::cast_slice(whole), cut, with }
    }

    /// How many whole vectors it has.
    #[inline(always)]
    pub(crate) fn vectors(self) -> usize {
        self.whole.len()
    }

    /// Adds `COUNT` vectors, from vector number `at` on, to `sum`.
    #[inline(always)]
    pub(crate) fn add<const COUNT: usize>(self, simd: S, at: usize, sum: &mut [S::V; COUNT]) {
        let groups = self.whole[at..at + COUNT].first_chunk().expect("so many groups");
        self.reading.add(simd, self.with, groups, sum);
    }

    /// Adds the elements after the last whole vector; what becomes of the other lanes is left open.
    #[inline(always)]
    pub(crate) fn add_cut(self, simd: S, sum: &mut [S::V; 1]) {
        self.reading.add(simd, self.with, &[self.reading.cut(simd, self.cut)], sum);
    }

    /// What is not added yet.
    #[inline(always)]
    pub(crate) fn bias(self, simd: S) -> S::V {
        R::bias(simd, self.with)
    }

    /// One vector from element `at` on, as far as the row reaches; the other lanes are zero.
    #[inline(always)]
    fn vector(self, simd: S, at: usize, dim: usize) -> S::V {
        if at + LANES <= dim {
            return self.reading.load(simd, self.with, &self.whole[at / LANES]);
        }
        let cut = self.reading.cut(simd, self.cut);
        simd.first(self.reading.load(simd, self.with, &cut), dim - at)
    }

    /// Writes all elements to `out`.
    #[inline(always)]
    fn copy(self, simd: S, out: &mut [f32]) {
        let (pairs, rest) = out.as_chunks_mut::<{ 2 * LANES }>();
        let done = pairs.len() * 2;
        for (pair, out) in self.whole.as_chunks().0.iter().zip(pairs) {
            let [first, second] = self.reading.load_pair(simd, self.with, pair);
            simd.store_at(out, 0, first);
            simd.store_at(out, LANES, second);
        }
        let mut at = 0;
        while at < rest.len() {
            let elements = self.vector(simd, done * LANES + at, done * LANES + rest.len());
            simd.store_at(rest, at, elements);
            at += LANES;
        }
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

    /// The group of which there is less than a whole one, filled with zeros.
    #[inline(always)]
    fn cut<S: Simd>(self, _simd: S, units: &[Self::Unit]) -> Self::Group {
        filled(units)
    }

    /// Makes a group; of a quantized format's, the numbers are codes.
    fn store<S: Simd>(self, simd: S, group: &mut Self::Group, numbers: S::V);
}

/// These units, and zeros.
#[inline(always)]
fn filled<U: Pod, G: Pod>(units: &[U]) -> G {
    let mut group = G::zeroed();
    bytemuck::cast_slice_mut(std::slice::from_mut(&mut group))[..units.len()].copy_from_slice(units);
    group
}

/// Units of a group.
#[inline(always)]
const fn group_len<P: Packing>() -> usize {
    size_of::<P::Group>() / size_of::<P::Unit>()
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

/// Single precision.
#[derive(Clone, Copy)]
pub(crate) struct Fp32;

impl Packing for Fp32 {
    type Unit = f32;
    type Group = Lanes;

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, group: &Lanes) -> S::V {
        simd.load(group)
    }

    #[inline(always)]
    fn cut<S: Simd>(self, simd: S, units: &[f32]) -> Lanes {
        simd.lanes(simd.load_partial(units))
    }

    #[inline(always)]
    fn store<S: Simd>(self, simd: S, group: &mut Lanes, numbers: S::V) {
        simd.store(group, numbers);
    }
}

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
    /// Codes of 4 bits.
    Int4, [u8; LANES / 2], load_int4, store_int4
);
packing!(
    /// Codes of 2 bits.
    Int2, [u8; LANES / 4], load_int2, store_int2
);

/// Elements are the numbers that are packed.
#[derive(Clone, Copy)]
pub(crate) struct Plain<P>(pub(crate) P);

impl<P: Packing> Reading for Plain<P> {
    type Unit = P::Unit;
    type Group = P::Group;
    /// The weight.
    type With<S: Simd> = Option<S::V>;

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, weight: Option<S::V>, group: &P::Group) -> S::V {
        weighted(simd, self.0.load(simd, group), weight)
    }

    #[inline(always)]
    fn cut<S: Simd>(self, simd: S, units: &[P::Unit]) -> P::Group {
        self.0.cut(simd, units)
    }
}

/// Elements are `scale * code + bias`, rounded once.
#[derive(Clone, Copy)]
pub(crate) struct Scaled<P>(pub(crate) P);

impl<P: Packing<Unit = u8>> Reading for Scaled<P> {
    type Unit = u8;
    type Group = P::Group;
    /// Scale and bias.
    type With<S: Simd> = [S::V; 2];
    const BIASED: bool = true;

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, [scale, bias]: [S::V; 2], group: &P::Group) -> S::V {
        simd.mul_add(self.0.load(simd, group), scale, bias)
    }

    #[inline(always)]
    fn add<S: Simd, const COUNT: usize>(
        self,
        simd: S,
        [scale, _]: [S::V; 2],
        groups: &[P::Group; COUNT],
        sum: &mut [S::V; COUNT],
    ) {
        for i in 0..COUNT {
            sum[i] = simd.mul_add(self.0.load(simd, &groups[i]), scale, sum[i]);
        }
    }

    #[inline(always)]
    fn bias<S: Simd>(_simd: S, [_, bias]: [S::V; 2]) -> S::V {
        bias
    }
}

impl<P: Packing<Unit = u8>> CodeReading for Scaled<P> {
    type Alone = Self;

    #[inline(always)]
    fn with<S: Simd>(self, simd: S, [scale, bias]: [S::V; 2], weight: Option<S::V>) -> [S::V; 2] {
        [weighted(simd, scale, weight), weighted(simd, bias, weight)]
    }

    #[inline(always)]
    fn alone(self) -> Self {
        self
    }
}

/// Elements are as of [`Scaled`], of codes of 4 bits into a codebook: a row has but 16 different ones, which are made first and
/// then chosen from.
#[derive(Clone, Copy)]
pub(crate) struct Chosen<'a>(pub(crate) &'a Lanes);

impl Reading for Chosen<'_> {
    type Unit = u8;
    type Group = [u8; LANES / 2];
    /// The elements.
    type With<S: Simd> = S::V;

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, elements: S::V, group: &Self::Group) -> S::V {
        simd.look_up(group, elements)
    }
}

impl CodeReading for Chosen<'_> {
    type Alone = Self;

    #[inline(always)]
    fn with<S: Simd>(self, simd: S, [scale, bias]: [S::V; 2], weight: Option<S::V>) -> S::V {
        weighted(simd, simd.mul_add(simd.load(self.0), scale, bias), weight)
    }

    #[inline(always)]
    fn alone(self) -> Self {
        self
    }
}

/// The same for rows of [`LONG`] elements and more, for which more is made first.
#[derive(Clone, Copy)]
pub(crate) struct ChosenInPairs<'a>(pub(crate) &'a Lanes);

/// From there on it pays.
pub(crate) const LONG: usize = 64;

impl Reading for ChosenInPairs<'_> {
    type Unit = u8;
    type Group = [u8; LANES / 2];
    type With<S: Simd> = S::Planes;
    const IN_PAIRS: bool = true;

    #[inline(always)]
    fn load<S: Simd>(self, simd: S, planes: S::Planes, group: &Self::Group) -> S::V {
        let [elements, _] = simd.look_up_pair(&[*group; 2], planes);
        elements
    }

    #[inline(always)]
    fn load_pair<S: Simd>(self, simd: S, planes: S::Planes, pair: &[Self::Group; 2]) -> [S::V; 2] {
        simd.look_up_pair(pair, planes)
    }
}

impl<'a> CodeReading for ChosenInPairs<'a> {
    type Alone = Chosen<'a>;

    #[inline(always)]
    fn with<S: Simd>(self, simd: S, affine: [S::V; 2], weight: Option<S::V>) -> S::Planes {
        simd.planes(Chosen(self.0).with(simd, affine, weight))
    }

    #[inline(always)]
    fn alone(self) -> Self::Alone {
        Chosen(self.0)
    }
}

/// A row of `len` units.
#[inline(always)]
fn row_of<T>(all: &[T], row: usize, len: usize) -> &[T] {
    let at = row * len;
    &all[at..at + len]
}

/// Rows of numbers.
#[derive(Clone, Copy)]
pub(crate) struct PlainRows<'a, P: Packing> {
    pub(crate) packing: P,
    pub(crate) data: &'a [P::Unit],
    pub(crate) dim: usize,
}

impl<P: Packing> PlainRows<'_, P> {
    #[inline(always)]
    fn read<S: Simd>(&self, simd: S, row: usize, weight: Option<f32>) -> Row<'_, S, Plain<P>> {
        Row::new(Plain(self.packing), row_of(self.data, row, self.dim), splat(simd, weight), self.dim)
    }
}

impl<P: Packing<Unit: Send + Sync>> Rows for PlainRows<'_, P> {
    type Reading = Plain<P>;

    #[inline(always)]
    fn dim(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn of_vectors(self, vectors: usize) -> Self {
        Self { dim: vectors * LANES, ..self }
    }

    #[inline(always)]
    fn open_all<S: Simd, const COUNT: usize>(
        &self,
        simd: S,
        rows: [usize; COUNT],
        weights: [Option<f32>; COUNT],
    ) -> [Row<'_, S, Plain<P>>; COUNT] {
        let mut all = [self.read(simd, rows[0], weights[0]); COUNT];
        for i in 1..COUNT {
            all[i] = self.read(simd, rows[i], weights[i]);
        }
        all
    }

    #[inline(always)]
    fn load_at<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V {
        self.open(simd, row, None).vector(simd, at, self.dim)
    }

    #[inline(always)]
    fn has_cached(&self) -> bool {
        false
    }

    #[inline(always)]
    fn cached<S: Simd>(
        &self,
        _simd: S,
        _row: usize,
        _weight: Option<f32>,
    ) -> Option<Row<'_, S, Plain<Fp32>>> {
        None
    }

    #[inline(always)]
    fn bytes(&self, row: u64) -> (*const u8, usize) {
        let at = (row as usize).wrapping_mul(self.dim);
        (self.data.as_ptr().wrapping_add(at).cast(), self.dim * size_of::<P::Unit>())
    }

    #[inline(always)]
    fn scale(&self, _row: u64) -> Option<*const u8> {
        None
    }
}

/// Rows of a quantized format; those of cached rows are as they are.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedRows<'a, R> {
    pub(crate) reading: R,
    pub(crate) codes: &'a [u8],
    pub(crate) scales: Scales<'a>,
    /// Bytes of a row's scale and bias: known here, they take no question about their format.
    pub(crate) pair_bytes: usize,
    pub(crate) row_bytes: usize,
    pub(crate) dim: usize,
    /// The rows that are not in codes.
    pub(crate) cache: CachedRows<'a>,
}

impl<R: CodeReading> QuantizedRows<'_, R> {
    /// A row in codes, of such scale and bias, read so.
    #[inline(always)]
    fn read<S: Simd, A: CodeReading>(
        &self,
        simd: S,
        reading: A,
        row: usize,
        affine: [S::V; 2],
        weight: Option<f32>,
    ) -> Row<'_, S, A> {
        let with = reading.with(simd, affine, splat(simd, weight));
        Row::new(reading, row_of(self.codes, row, self.row_bytes), with, self.dim)
    }
}

impl<R: CodeReading> Rows for QuantizedRows<'_, R> {
    type Reading = R;

    #[inline(always)]
    fn dim(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn of_vectors(self, vectors: usize) -> Self {
        Self { dim: vectors * LANES, row_bytes: vectors * size_of::<R::Group>(), ..self }
    }

    #[inline(always)]
    fn open_all<S: Simd, const COUNT: usize>(
        &self,
        simd: S,
        rows: [usize; COUNT],
        weights: [Option<f32>; COUNT],
    ) -> [Row<'_, S, R>; COUNT] {
        let affine = self.scales.splat(simd, rows);
        let mut all = [self.read(simd, self.reading, rows[0], affine[0], weights[0]); COUNT];
        for i in 1..COUNT {
            all[i] = self.read(simd, self.reading, rows[i], affine[i], weights[i]);
        }
        all
    }

    #[inline(always)]
    fn load_at<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V {
        if let Some(row) = self.cached(simd, row, None) {
            return row.vector(simd, at, self.dim);
        }
        let [affine] = self.scales.splat(simd, [row]);
        self.read(simd, self.reading.alone(), row, affine, None).vector(simd, at, self.dim)
    }

    #[inline(always)]
    fn has_cached(&self) -> bool {
        !self.cache.is_empty()
    }

    #[inline(always)]
    fn cached<S: Simd>(&self, simd: S, row: usize, weight: Option<f32>) -> Option<Row<'_, S, Plain<Fp32>>> {
        let units = self.cache.get(row, self.scales, self.dim)?;
        Some(Row::new(Plain(Fp32), units, splat(simd, weight), self.dim))
    }

    #[inline(always)]
    fn bytes(&self, row: u64) -> (*const u8, usize) {
        let at = (row as usize).wrapping_mul(self.row_bytes);
        (self.codes.as_ptr().wrapping_add(at), self.row_bytes)
    }

    #[inline(always)]
    fn scale(&self, row: u64) -> Option<*const u8> {
        Some(self.scales.start().wrapping_add((row as usize).wrapping_mul(self.pair_bytes)))
    }
}

/// Runs `$body` with `$rows` the rows that a [`RowsRef`](crate::table_rows::RowsRef) is of, whatever their format.
macro_rules! with_rows {
    ($rows_ref:expr, |$rows:ident| $body:expr) => {{
        use $crate::rows::{Bf16, Chosen, ChosenInPairs, Fp16, Fp32, Int2, Int4, Int8, LONG, Scaled};
        use $crate::table_rows::UNIFORM;
        let of: $crate::table_rows::RowsRef = $rows_ref;
        match of.format {
            $crate::RowFormat::Fp32 => {
                let $rows = of.plain(Fp32);
                $body
            }
            $crate::RowFormat::Fp16 => {
                let $rows = of.plain(Fp16);
                $body
            }
            $crate::RowFormat::Bf16 => {
                let $rows = of.plain(Bf16);
                $body
            }
            $crate::RowFormat::Int8 => {
                let $rows = of.quantized(Scaled(Int8));
                $body
            }
            $crate::RowFormat::Int4 if *of.codebook == UNIFORM => {
                let $rows = of.quantized(Scaled(Int4));
                $body
            }
            $crate::RowFormat::Int4 if of.dim < LONG => {
                let $rows = of.quantized(Chosen(of.codebook));
                $body
            }
            $crate::RowFormat::Int4 => {
                let $rows = of.quantized(ChosenInPairs(of.codebook));
                $body
            }
            $crate::RowFormat::Int2 => {
                let $rows = of.quantized(Scaled(Int2));
                $body
            }
        }
    }};
}
pub(crate) use with_rows;
