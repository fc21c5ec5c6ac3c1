//! What can go wrong, in words that name the argument, what was expected and what came.
//!
//! When a function of this crate returns an error, no table and no optimizer state has changed.
//! (It panics only when memory it was lent changes while it reads.)

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused or ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An id that its table does not have.
    #[error(
        "indices[{position}]: expected 0 <= id < {rows}, the rows of table '{table}', got {id} \
         (feature {feature}, bag {bag})"
    )]
    Id {
        /// Where in `indices`.
        position: usize,
        /// The id that came.
        id: i64,
        /// Name of the table.
        table: String,
        /// Rows of the table.
        rows: usize,
        /// The feature that the id belongs to.
        feature: usize,
        /// The bag within the feature (the id within the feature for [`Pooling::None`](crate::Pooling::None)).
        bag: usize,
    },
    /// An argument of a wrong shape or value.
    #[error("{argument}: expected {expected}, got {got}")]
    Argument {
        /// The argument.
        argument: String,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// A gradient that is to be clipped and has no norm.
    #[error(
        "gradient: expected finite numbers, since clip_norm scales all by their norm, got a norm of {norm}; the tables \
         are as they were"
    )]
    NotFinite {
        /// The norm, in words.
        norm: String,
    },
    /// Memory that cannot be had.
    #[error("cannot allocate {what}: {bytes} bytes asked, {reason}")]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes that were asked for.
        bytes: u128,
        /// Why they cannot be had.
        reason: String,
    },
    /// Threads that the system does not grant.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// Threads that were asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
    /// A call on tables that this very thread is in a call on, from [`Context::poll`](crate::Context::poll).
    #[error(
        "expected no other call on these tables by this thread, got one made by a signal handler during a call"
    )]
    Reentered,
    /// [`Context::poll`](crate::Context::poll) asked for the end of the call.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Argument`].
    pub(crate) fn argument(
        argument: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { argument: argument.into(), expected: expected.to_string(), got: got.to_string() }
    }
}
