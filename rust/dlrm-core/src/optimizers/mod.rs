//! The optimizers: what one does to a touched row, given the sum of the row's gradients.
//!
//! A new optimizer is a file here with a rule, and a line in [`optimizers`]; the formulas are in the files.

mod adagrad;
mod adam;
mod adjusted;
mod ftrl;
mod hyperparameters;
mod lamb;
mod lars_sgd;
mod moments;
mod momentum_sgd;
mod row_wise_adagrad;
mod row_wise_rmsprop;
mod sgd;

use std::fmt;
use std::str::FromStr;

use crate::kernels::touched::{PARTS, Touched};
use crate::{Error, Level, Result, RowFormat, named};

use adagrad::Adagrad;
use adam::{Adam, PartialRowWiseAdam};
use adjusted::{Adjusted, Adjustment};
use ftrl::Ftrl;
use hyperparameters::Hyperparameters;
use lamb::{Lamb, PartialRowWiseLamb};
use lars_sgd::LarsSgd;
use momentum_sgd::MomentumSgd;
use row_wise_adagrad::RowWiseAdagrad;
use row_wise_rmsprop::RowWiseRmsprop;
use sgd::Sgd;

/// A part of the state that an optimizer keeps beside a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatePart {
    /// By torch's name where torch has it.
    pub name: &'static str,
    /// Whether it is one number for a row, not one for each element.
    pub row_wise: bool,
}

impl StatePart {
    const fn of_elements(name: &'static str) -> Self {
        Self { name, row_wise: false }
    }

    const fn of_rows(name: &'static str) -> Self {
        Self { name, row_wise: true }
    }

    /// Floats for a row of `dim` elements.
    #[must_use]
    pub const fn len(self, dim: usize) -> usize {
        if self.row_wise { 1 } else { dim }
    }
}

/// Every optimizer: its documentation, its rule, its name, the hyperparameters beside those of [`ADJUSTED`] or
/// [`CLIPPED`], and its state.
macro_rules! optimizers {
    ($($(#[$doc:meta])* $kind:ident, $name:literal, $hyperparameters:expr, [$($part:expr),*];)*) => {
        /// Which optimizer, without its hyperparameters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// Its name in Python and in messages.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// The hyperparameters that it reads, by torch's names, in the order of [`Optimizer::new`].
            #[must_use]
            pub const fn hyperparameters(self) -> &'static [&'static str] {
                match self {
                    $(Self::$kind => $hyperparameters,)*
                }
            }

            /// What it keeps for a row.
            #[must_use]
            pub const fn state(self) -> &'static [StatePart] {
                match self {
                    $(Self::$kind => const { &[$($part),*] },)*
                }
            }
        }

        #[derive(Clone, Copy, Debug)]
        enum AnyRule {
            $($kind(Adjusted<$kind>),)*
        }

        impl AnyRule {
            fn new(kind: Kind, values: &Hyperparameters) -> Self {
                let adjustment = Adjustment::new(values, !kind.hyperparameters().contains(&"decoupled_weight_decay"));
                match kind {
                    $(Kind::$kind => Self::$kind(Adjusted { rule: $kind::new(values), adjustment }),)*
                }
            }

            fn apply(&self, touched: Touched, level: Level) {
                match self {
                    $(Self::$kind(rule) => touched.apply(rule, level),)*
                }
            }
        }
    };
}

/// The names of `$first`, then those of the adjustments.
macro_rules! adjusted {
    ($($first:literal),*) => {
        &[$($first,)* "weight_decay", "decoupled_weight_decay", "clip_norm", "clip_value", "max_norm"]
    };
}

optimizers! {
    /// Stochastic gradient descent.
    Sgd, "sgd", adjusted!["lr"], [];
    /// The same with momentum.
    MomentumSgd, "momentum_sgd", adjusted!["lr", "momentum", "nesterov"],
        [StatePart::of_elements("momentum_buffer")];
    /// Adagrad, a sum of squares for each element.
    Adagrad, "adagrad", adjusted!["lr", "eps"], [StatePart::of_elements("sum")];
    /// Adagrad, one sum of mean squares for each row.
    RowWiseAdagrad, "rowwise_adagrad", adjusted!["lr", "eps"], [StatePart::of_rows("sum")];
    /// Adam; `AdamW` with decoupled weight decay.
    Adam, "adam", adjusted!["lr", "beta1", "beta2", "eps"],
        [StatePart::of_elements("exp_avg"), StatePart::of_elements("exp_avg_sq")];
    /// Adam with one second moment for each row.
    PartialRowWiseAdam, "partial_rowwise_adam", adjusted!["lr", "beta1", "beta2", "eps"],
        [StatePart::of_elements("exp_avg"), StatePart::of_rows("exp_avg_sq")];
    /// LAMB, with a row for a layer.
    Lamb, "lamb", &["lr", "beta1", "beta2", "eps", "weight_decay", "clip_norm", "clip_value", "max_norm"],
        [StatePart::of_elements("exp_avg"), StatePart::of_elements("exp_avg_sq")];
    /// LAMB with one second moment for each row.
    PartialRowWiseLamb, "partial_rowwise_lamb",
        &["lr", "beta1", "beta2", "eps", "weight_decay", "clip_norm", "clip_value", "max_norm"],
        [StatePart::of_elements("exp_avg"), StatePart::of_rows("exp_avg_sq")];
    /// LARS, with a row for a layer.
    LarsSgd, "lars_sgd", &["lr", "eta", "momentum", "weight_decay", "clip_norm", "clip_value", "max_norm"],
        [StatePart::of_elements("momentum_buffer")];
    /// `RMSprop`, one mean of mean squares for each row.
    RowWiseRmsprop, "rowwise_rmsprop", adjusted!["lr", "alpha", "eps"], [StatePart::of_rows("square_avg")];
    /// FTRL-Proximal.
    Ftrl, "ftrl", &["lr", "beta", "l1", "l2", "clip_norm", "clip_value", "max_norm"],
        [StatePart::of_elements("z"), StatePart::of_elements("n")];
}

impl Kind {
    /// Refuses to keep its state in a format.
    ///
    /// In bf16, rounded stochastically, sums and means are unbiased, and off by some 6 % of themselves however many steps
    /// they have (the variance is half of what separates neighbours). Rules move weights by them; but FTRL's weights are
    /// nothing but a function of its state, and would be off as much.
    pub(crate) fn check_state(self, format: RowFormat) -> Result<()> {
        let expected = match (self, format) {
            (Self::Ftrl, RowFormat::Bf16) => "fp32 for ftrl, which computes its weights anew from the state",
            (_, RowFormat::Fp32 | RowFormat::Bf16) => return Ok(()),
            _ => "fp32 or bf16",
        };
        Err(Error::argument("state_dtype", expected, format))
    }

    /// Floats of every part of the state of a row of `dim` elements.
    pub(crate) fn state_lens(self, dim: usize) -> [usize; PARTS] {
        let mut lens = [0; PARTS];
        for (len, part) in lens.iter_mut().zip(self.state()) {
            *len = part.len(dim);
        }
        lens
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
        named::find("optimizer", Self::ALL.iter().copied(), Self::name, name)
    }
}

/// An optimizer with its hyperparameters, at one step.
#[derive(Clone, Copy, Debug)]
pub struct Optimizer {
    kind: Kind,
    rule: AnyRule,
    clip_norm: f64,
    step: Step,
}

/// Which update it is.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Updates are counted from 1.
    pub number: u64,
    /// With the number, what stochastic rounding is drawn from.
    pub seed: u64,
}

impl Optimizer {
    /// The optimizer of this kind with the values of its [`Kind::hyperparameters`].
    ///
    /// ```
    /// use dlrm_core::optimizers::{Kind, Optimizer, Step};
    ///
    /// let step = Step { number: 1, seed: 0 };
    /// let none = [0.0, 0.0, f64::INFINITY, f64::INFINITY, f64::INFINITY]; // neither weight decay nor bounds
    /// assert!(Optimizer::new(Kind::Sgd, &[&[0.1], &none[..]].concat(), step).is_ok());
    /// assert!(Optimizer::new(Kind::Sgd, &[&[-0.1], &none[..]].concat(), step).is_err());
    /// ```
    pub fn new(kind: Kind, values: &[f64], step: Step) -> Result<Self> {
        let values = Hyperparameters::new(kind, values, step.number)?;
        Ok(Self { kind, rule: AnyRule::new(kind, &values), clip_norm: values.precise("clip_norm"), step })
    }

    /// Which it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// At which update.
    #[must_use]
    pub const fn step(&self) -> Step {
        self.step
    }

    /// The largest norm of all gradients of a call; infinity for no bound.
    pub(crate) const fn clip_norm(&self) -> f64 {
        self.clip_norm
    }

    /// Changes the rows.
    pub(crate) fn apply(&self, touched: Touched, level: Level) {
        self.rule.apply(touched, level);
    }
}
