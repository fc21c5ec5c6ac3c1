//! A codebook for the 4-bit codes of a table: the 16 numbers that suit its rows best, rather than 0 to 15.
//!
//! Rows with heavy tails have most elements near the middle, where evenly spaced codes are too far apart. Lloyd's
//! algorithm (Lloyd 1982, "Least squares quantization in PCM"), with every row brought to the same units by its own scale
//! and bias, which are renewed with the codes.

use crate::kernels::decode::Decode;
use crate::kernels::fit::Codebook;
use crate::kernels::train::Train;
use crate::kernels::{LANES, Lanes};
use crate::rows::with_rows;
use crate::table_rows::{RowsRef, UNIFORM};
use crate::{Context, Level};

/// Rows that are looked at, at most: evenly spread over the table.
const SAMPLE: usize = 4096;

/// Times that the numbers are renewed.
const ROUNDS: usize = 12;

/// The codebook of a table of `rows` rows; rows that are not finite are left out, unless such elements are zero.
pub(crate) fn train(source: RowsRef, rows: usize, zero_not_finite: bool, ctx: &Context) -> Codebook {
    let mut sample = sample(source, rows, ctx.level);
    if zero_not_finite {
        sample.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = 0.0);
    }
    let finite = sample.chunks_exact(source.dim).filter(|row| row.iter().all(|x| x.is_finite()));
    let sample: Vec<f32> = finite.flatten().copied().collect();
    let mut codebook = Codebook::new(UNIFORM);
    for _ in 0..ROUNDS {
        let sums = ctx.level.run(Train { rows: &sample, dim: source.dim, codebook });
        codebook = Codebook::new(renewed(codebook.numbers, &sums));
    }
    codebook
}

/// The mean of what chose each code, then all moved to reach from 0 to 15 as codes do.
fn renewed(numbers: Lanes, sums: &[[f64; 2]; LANES]) -> Lanes {
    let mean = |k: usize| {
        let [weight, sum] = sums[k];
        if weight > 0.0 { sum / weight } else { f64::from(numbers[k]) }
    };
    let mut means: [f64; LANES] = std::array::from_fn(mean);
    means.sort_by(f64::total_cmp);
    let (first, last) = (means[0], means[LANES - 1]);
    if last - first <= 0.0 {
        return numbers;
    }
    means.map(|mean| ((mean - first) / (last - first) * 15.0) as f32)
}

fn sample(source: RowsRef, rows: usize, level: Level) -> Vec<f32> {
    let dim = source.dim;
    let count = rows.min(SAMPLE);
    let mut sample = vec![0.0; count * dim];
    for (i, into) in sample.chunks_exact_mut(dim).enumerate() {
        let row = (rows as u128 * i as u128 / count as u128) as usize;
        with_rows!(source, |rows| level.run(Decode { rows, first: row, into }));
    }
    sample
}
