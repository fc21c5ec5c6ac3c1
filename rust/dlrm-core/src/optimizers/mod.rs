//! The optimizers: what one does to a touched row, given the sum of the row's gradients.
//!
//! A new optimizer is a file here with a rule, a [`Kind`] and an [`Optimizer`]; the formulas are in the files.

mod adagrad;
mod row_wise_adagrad;
mod sgd;

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result, named};

pub use adagrad::Adagrad;
pub use row_wise_adagrad::RowWiseAdagrad;
pub use sgd::Sgd;

/// Which optimizer, without its hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Stochastic gradient descent.
    Sgd,
    /// Adagrad, a sum of squares for each element.
    Adagrad,
    /// Adagrad, one sum of mean squares for each row.
    RowWiseAdagrad,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Sgd, Self::Adagrad, Self::RowWiseAdagrad];

    /// Its name in Python and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sgd => "sgd",
            Self::Adagrad => "adagrad",
            Self::RowWiseAdagrad => "rowwise_adagrad",
        }
    }

    /// The hyperparameters that it reads, by torch's names, in the order of [`Optimizer::new`].
    #[must_use]
    pub const fn hyperparameters(self) -> &'static [&'static str] {
        match self {
            Self::Sgd => &["lr"],
            Self::Adagrad | Self::RowWiseAdagrad => &["lr", "eps"],
        }
    }

    /// Floats that it keeps for a row of `dim` elements.
    #[must_use]
    pub const fn state_len(self, dim: usize) -> usize {
        match self {
            Self::Sgd => 0,
            Self::Adagrad => dim,
            Self::RowWiseAdagrad => 1,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        named::find("optimizer", Self::ALL, Self::name, name)
    }
}

/// An optimizer with its hyperparameters.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Optimizer {
    /// See [`Kind::Sgd`].
    Sgd(Sgd),
    /// See [`Kind::Adagrad`].
    Adagrad(Adagrad),
    /// See [`Kind::RowWiseAdagrad`].
    RowWiseAdagrad(RowWiseAdagrad),
}

impl Optimizer {
    /// The optimizer of this kind with the values of its [`Kind::hyperparameters`].
    ///
    /// `lr` is finite and at least 0; `eps` is above 0 and `lr / eps` finite, else an element that never had a gradient
    /// would become NaN.
    pub fn new(kind: Kind, values: &[f64]) -> Result<Self> {
        let names = kind.hyperparameters();
        if values.len() != names.len() {
            return Err(Error::argument("hyperparameters", names.join(", "), format_args!("{values:?}")));
        }
        let mut lr = 0.0;
        let mut eps = 0.0;
        for (&name, &value) in names.iter().zip(values) {
            let (slot, fits, expected) = match name {
                "lr" => (&mut lr, value >= 0.0, "a finite number in float32, at least 0"),
                _ => (&mut eps, value as f32 > 0.0, "a finite number above 0 in float32"),
            };
            if !fits || !(value as f32).is_finite() {
                return Err(Error::argument(name, expected, format_args!("{value:e}")));
            }
            *slot = value as f32;
        }
        if names.contains(&"eps") && !(lr / eps).is_finite() {
            let expected = "a number so large that lr / eps is finite in float32";
            return Err(Error::argument("eps", expected, format_args!("{eps:e}")));
        }
        Ok(match kind {
            Kind::Sgd => Self::Sgd(Sgd { lr }),
            Kind::Adagrad => Self::Adagrad(Adagrad { lr, eps }),
            Kind::RowWiseAdagrad => Self::RowWiseAdagrad(RowWiseAdagrad { lr, eps }),
        })
    }

    /// Which it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Sgd(_) => Kind::Sgd,
            Self::Adagrad(_) => Kind::Adagrad,
            Self::RowWiseAdagrad(_) => Kind::RowWiseAdagrad,
        }
    }
}
