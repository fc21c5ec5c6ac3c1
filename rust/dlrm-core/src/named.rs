//! Values that have a name in Python and in messages.

use crate::{Error, Result};

/// The one of `all` that is called `name`; `argument` is what the name was given as.
pub(crate) fn find<T: Copy>(
    argument: &str,
    all: impl IntoIterator<Item = T> + Clone,
    name_of: impl Fn(T) -> &'static str,
    name: &str,
) -> Result<T> {
    let found = all.clone().into_iter().find(|&one| name_of(one) == name);
    found.ok_or_else(|| {
        let known: Vec<_> = all.into_iter().map(name_of).collect();
        Error::argument(argument, format_args!("one of {}", known.join(", ")), format_args!("'{name}'"))
    })
}
