//! The numbers that an optimizer is given, checked.

use super::Kind;
use crate::{Error, Result};

/// The values of a kind's hyperparameters, every one of them within its bounds, also in float32.
pub(super) struct Hyperparameters<'a> {
    names: &'static [&'static str],
    values: &'a [f64],
    step: u64,
}

impl<'a> Hyperparameters<'a> {
    /// `step` counts updates from 1.
    ///
    /// `eps` is above 0 and `lr / eps` finite, else an element that never had a gradient would become NaN.
    pub(super) fn new(kind: Kind, values: &'a [f64], step: u64) -> Result<Self> {
        let names = kind.hyperparameters();
        if values.len() != names.len() {
            return Err(Error::argument("hyperparameters", names.join(", "), format_args!("{values:?}")));
        }
        if step == 0 {
            return Err(Error::argument("step", "at least 1", step));
        }
        for (&name, &value) in names.iter().zip(values) {
            let (fits, expected) = bounds(kind, name, value);
            if !fits {
                return Err(Error::argument(name, expected, format_args!("{value:e}")));
            }
        }
        let made = Self { names, values, step };
        if names.contains(&"eps") && !(made.get("lr") / made.get("eps")).is_finite() {
            let expected = "a number so large that lr / eps is finite in float32";
            return Err(Error::argument("eps", expected, format_args!("{:e}", made.precise("eps"))));
        }
        Ok(made)
    }

    /// The value of a hyperparameter that the kind has.
    pub(super) fn get(&self, name: &str) -> f32 {
        self.precise(name) as f32
    }

    /// The same before it is rounded.
    pub(super) fn precise(&self, name: &str) -> f64 {
        let place = self.names.iter().position(|&own| own == name).expect("a hyperparameter of the kind");
        self.values[place]
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }
}

/// Whether a value can be, and what can.
fn bounds(kind: Kind, name: &str, value: f64) -> (bool, &'static str) {
    let x = value as f32;
    match name {
        "lr" if kind == Kind::Ftrl => (x > 0.0 && x.is_finite(), "a finite number above 0 in float32"),
        "eps" => (x > 0.0 && x.is_finite(), "a finite number above 0 in float32"),
        "beta1" | "beta2" | "momentum" | "alpha" => ((0.0..1.0).contains(&x), "a number from 0 to below 1"),
        "clip_norm" | "clip_value" | "max_norm" => (x > 0.0, "a number above 0, infinity for no bound"),
        "nesterov" | "decoupled_weight_decay" => ([0.0, 1.0].contains(&value), "0 or 1"),
        _ => (value >= 0.0 && x.is_finite(), "a finite number in float32, at least 0"),
    }
}
