//! The optimizers in float64, one row at a time, written from their papers.

use dlrm_core::optimizers::{Kind, Optimizer, Step};

/// A value for every hyperparameter, none of which leaves its term out, but that every other optimizer does not clip by norm.
pub(crate) fn value(kind: Kind, name: &str) -> f64 {
    match name {
        "lr" if kind == Kind::Adagrad || kind == Kind::RowWiseAdagrad => 0.1,
        "lr" => 0.05,
        "eps" => 1e-8,
        "beta1" | "momentum" => 0.9,
        "beta2" => 0.99,
        "alpha" => 0.95,
        "beta" | "nesterov" => 1.0,
        "l1" | "eta" => 0.1,
        "l2" | "weight_decay" => 0.01,
        "decoupled_weight_decay" => f64::from(kind == Kind::Adam),
        "clip_norm" if Kind::ALL.iter().position(|&one| one == kind).unwrap() % 2 == 0 => f64::INFINITY,
        "clip_norm" => 12.0,
        "clip_value" => 0.7,
        "max_norm" => 2.5,
        other => panic!("no value for {other}"),
    }
}

pub(crate) fn values(kind: Kind) -> Vec<f64> {
    kind.hyperparameters().iter().map(|name| value(kind, name)).collect()
}

/// The optimizer of a kind with these values, for each of some tables.
pub(crate) fn optimizers(kind: Kind, number: u64, tables: usize) -> Vec<Optimizer> {
    vec![Optimizer::new(kind, &values(kind), Step { number, seed: 5 }).unwrap(); tables]
}

/// By what all gradients of a step are multiplied, whose elements these are.
pub(crate) fn clip_ratio<'a>(kind: Kind, elements: impl Iterator<Item = &'a f64>) -> f64 {
    let norm = elements.map(|x| x * x).sum::<f64>().sqrt();
    (value(kind, "clip_norm") / (norm + 1e-6)).min(1.0)
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A row and its state in float64.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) weights: Vec<f64>,
    pub(crate) state: [Vec<f64>; 2],
}

impl Row {
    /// One update, number `step`, by a gradient that has been clipped by norm.
    pub(crate) fn update(&mut self, kind: Kind, gradient: &[f64], step: u64) {
        let of = |name: &str| value(kind, name);
        let has = |name: &str| kind.hyperparameters().contains(&name);
        let clip = of("clip_value");
        let mut g: Vec<f64> = gradient.iter().map(|g| g.clamp(-clip, clip)).collect();
        if has("decoupled_weight_decay") {
            let decay = of("weight_decay");
            if of("decoupled_weight_decay") > 0.0 {
                self.weights.iter_mut().for_each(|w| *w *= 1.0 - of("lr") * decay);
            } else {
                g.iter_mut().zip(&self.weights).for_each(|(g, w)| *g += decay * w);
            }
        }
        let step = self.step(kind, &g, step);
        self.weights.iter_mut().zip(step).for_each(|(w, step)| *w -= step);
        let length = norm(&self.weights);
        if length > of("max_norm") {
            self.weights.iter_mut().for_each(|w| *w *= of("max_norm") / length);
        }
    }

    /// By how much the weights move, after the state has.
    fn step(&mut self, kind: Kind, g: &[f64], step: u64) -> Vec<f64> {
        let of = |name: &str| value(kind, name);
        let lr = of("lr");
        let dim = g.len();
        let mean = g.iter().map(|g| g * g).sum::<f64>() / dim as f64;
        let [first, second] = &mut self.state;
        let weights = &self.weights;
        match kind {
            Kind::Sgd => g.iter().map(|g| lr * g).collect(),
            Kind::MomentumSgd => (0..dim)
                .map(|c| {
                    first[c] = of("momentum") * first[c] + g[c];
                    lr * (g[c] + of("momentum") * first[c])
                })
                .collect(),
            Kind::Adagrad => (0..dim)
                .map(|c| {
                    first[c] += g[c] * g[c];
                    lr * g[c] / (first[c].sqrt() + of("eps"))
                })
                .collect(),
            Kind::RowWiseAdagrad => {
                first[0] += mean;
                g.iter().map(|g| lr * g / (first[0].sqrt() + of("eps"))).collect()
            }
            Kind::RowWiseRmsprop => {
                first[0] = of("alpha") * first[0] + (1.0 - of("alpha")) * mean;
                g.iter().map(|g| lr * g / (first[0].sqrt() + of("eps"))).collect()
            }
            Kind::LarsSgd => {
                let divisor = norm(g) + of("weight_decay") * norm(weights);
                let ratio = of("eta") * norm(weights) / divisor;
                for c in 0..dim {
                    let decayed = g[c] + of("weight_decay") * weights[c];
                    first[c] = of("momentum") * first[c] + lr * ratio * decayed;
                }
                first.clone()
            }
            Kind::Ftrl => (0..dim)
                .map(|c| {
                    let before: f64 = second[c];
                    second[c] += g[c] * g[c];
                    let sigma = (second[c].sqrt() - before.sqrt()) / lr;
                    first[c] += g[c] - sigma * weights[c];
                    let shrunk = first[c].abs() - of("l1");
                    let divisor = (of("beta") + second[c].sqrt()) / lr + of("l2");
                    let moved = if shrunk > 0.0 { -first[c].signum() * shrunk / divisor } else { 0.0 };
                    weights[c] - moved
                })
                .collect(),
            _ => {
                let mut u = self.direction(kind, g, mean, step);
                if matches!(kind, Kind::Lamb | Kind::PartialRowWiseLamb) {
                    u.iter_mut().zip(&self.weights).for_each(|(u, w)| *u += of("weight_decay") * w);
                    let ratio = norm(&self.weights) / norm(&u);
                    u = u.iter().map(|u| u * ratio).collect();
                }
                u.iter().map(|u| lr * u).collect()
            }
        }
    }

    /// Adam's.
    fn direction(&mut self, kind: Kind, g: &[f64], mean: f64, step: u64) -> Vec<f64> {
        let [b1, b2] = ["beta1", "beta2"].map(|name| value(kind, name));
        let [m, v] = &mut self.state;
        let row_wise =
            v.len() < g.len() || matches!(kind, Kind::PartialRowWiseAdam | Kind::PartialRowWiseLamb);
        if row_wise {
            v[0] = b2 * v[0] + (1.0 - b2) * mean;
        }
        let direction = |(c, g): (usize, &f64)| {
            m[c] = b1 * m[c] + (1.0 - b1) * g;
            if !row_wise {
                v[c] = b2 * v[c] + (1.0 - b2) * g * g;
            }
            let v = v[if row_wise { 0 } else { c }] / (1.0 - b2.powi(step as i32));
            m[c] / (1.0 - b1.powi(step as i32)) / (v.sqrt() + value(kind, "eps"))
        };
        g.iter().enumerate().map(direction).collect()
    }
}
