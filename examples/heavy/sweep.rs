//! A parameter sweep over a model of 200 MB, which is in memory once however many processes use it.
//!
//! The model is a table of how often which word follows which. `preload` loads it before the workers are forked, so all share its
//! pages. Each worker finds out how well a mixture of that table and of the single words' frequencies predicts another text (its
//! perplexity: the lower, the better); the sweep is over the table's share in the mixture, and its curve goes to a file.
//!
//! ```text
//! cargo run --release -p multiprocess-heavy-examples --example sweep -- sweep.svg
//! ```

use futures::TryStreamExt;
use multiprocess::{self as mp, Pool, Retry};
use plotters::prelude::*;
use std::error::Error;
use std::sync::OnceLock;

const WORDS: usize = 7_072; // The table has a square of that, of 4 bytes each.
const WORKERS: usize = 8;
const SHARES: u32 = 40;

static MODEL: OnceLock<Model> = OnceLock::new();

struct Model {
    follows: Vec<u32>,
    all: Vec<u32>,
}

/// Another program would read a file.
fn load() {
    let mut model = Model { follows: vec![1; WORDS * WORDS], all: vec![WORDS as u32; WORDS] };
    for pair in text(1).take(400_000).collect::<Vec<_>>().windows(2) {
        model.follows[pair[0] * WORDS + pair[1]] += 500;
        model.all[pair[0]] += 500;
    }
    MODEL.get_or_init(|| model);
}

/// A text of numbered words. Each word has four that often follow it.
fn text(seed: u64) -> impl Iterator<Item = usize> {
    let (mut random, mut word) = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), 0);
    std::iter::from_fn(move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let rare = (random >> 40) as f64 / (1_u64 << 24) as f64;
        let is_next = random >> 38 & 3 != 0;
        word = if is_next {
            (word * 31 + (random >> 36 & 3) as usize * 977) % WORDS
        } else {
            (rare * rare * WORDS as f64) as usize
        };
        Some(word)
    })
}

/// In a worker: the perplexity of a text of its own, and the process that found it.
fn perplexity(step: u32) -> (u32, f64) {
    let model = MODEL.get().expect("it was loaded before the first worker was started");
    let share = f64::from(step) / f64::from(SHARES);
    let total: f64 = model.all.iter().map(|count| f64::from(*count)).sum();
    let words: Vec<_> = text(2).take(50_000).collect();
    let surprise = words.windows(2).map(|pair| {
        let follows = f64::from(model.follows[pair[0] * WORDS + pair[1]]) / f64::from(model.all[pair[0]]);
        let alone = f64::from(model.all[pair[1]]) / total;
        -(share * follows + (1.0 - share) * alone).ln()
    });
    (step, (surprise.sum::<f64>() / (words.len() - 1) as f64).exp())
}

/// The memory of a process in KiB, where a page that n processes share counts as 1/n of a page.
fn proportional_memory(pid: u32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn plot(path: &str, curve: &[(f64, f64)]) -> Result<(), Box<dyn Error>> {
    let highest = curve.iter().map(|(_, y)| *y).fold(0.0, f64::max);
    let area = SVGBackend::new(path, (640, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Perplexity by the share of the table", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..1.0, 0.0..highest)?;
    chart.configure_mesh().draw()?;
    chart.draw_series(LineSeries::new(curve.iter().copied(), &RED))?;
    Ok(area.present()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    mp::run(async {
        let path = std::env::args().nth(1).ok_or("usage: sweep FILE.svg")?;
        mp::preload(load)?;
        let pool = Pool::new(WORKERS)?;
        let results = pool.imap_unordered(perplexity, 0..=SHARES).chunksize(1).retries(5).retry_if(Retry::DIED);
        let mut curve: Vec<_> =
            results.map_ok(|(step, y)| (f64::from(step) / f64::from(SHARES), y)).try_collect().await?;
        curve.sort_by(|one, other| one.0.total_cmp(&other.0));
        let memory = pool.stats().workers.iter().map(|worker| proportional_memory(worker.pid)).max();
        plot(&path, &curve)?;
        let best = curve.iter().min_by(|one, other| one.1.total_cmp(&other.1)).ok_or("the curve has no point")?;
        println!("{} points, the best at {} with a perplexity of {:.0}", curve.len(), best.0, best.1);
        println!("{WORKERS} workers, each of {} MiB or less", memory.unwrap_or(0).div_ceil(1024));
        Ok(())
    })
}
