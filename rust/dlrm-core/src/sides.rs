//! Items put on one of two sides, each side in their order.

use crate::Result;
use crate::memory::zeros;

/// The items that come with true, and the others; memory is for `what`.
///
/// Each is written to both sides, and kept on one: no branch that cannot be foreseen.
pub(crate) fn sides<T: bytemuck::Zeroable + Copy>(
    items: impl ExactSizeIterator<Item = (T, bool)>,
    what: &str,
) -> Result<[Vec<T>; 2]> {
    let (mut yes, mut no) = (zeros(items.len(), what)?, zeros(items.len(), what)?);
    let mut count = 0;
    for (i, (item, is_yes)) in items.enumerate() {
        yes[count] = item;
        no[i - count] = item;
        count += usize::from(is_yes);
    }
    no.truncate(yes.len() - count);
    yes.truncate(count);
    Ok([yes, no])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_item_is_on_its_side_in_order(flags in prop::collection::vec(any::<bool>(), 0..100)) {
            let expected: (Vec<_>, Vec<_>) = (0..flags.len()).partition(|&i| flags[i]);
            let [yes, no] = sides(flags.iter().copied().enumerate(), "a test").unwrap();
            prop_assert_eq!((yes, no), expected);
        }
    }
}
