//! One value for each feature of a call, without an allocation where features are few.

use smallvec::SmallVec;

/// One value for each feature: up to 32 on the stack.
pub(crate) type PerFeature<T> = SmallVec<[T; 32]>;
