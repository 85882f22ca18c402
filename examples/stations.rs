//! Stations that measure, each a process of its own: how processes talk to each other that are more than a pool.
//!
//! Each station says once that it is ready (`oneshot`) and puts what it measures into a queue of its own, and the program reads all queues as one
//! (`QueueSet`). The unit is a setting that changes while they measure (`watch`), news go to all of them (`broadcast`), and one token ends them. What they
//! record by `tracing` is in the log of the program.
//!
//! `cargo run --example stations`

use multiprocess::{
    self as mp, BroadcastReceiver, CancellationToken, Group, OneshotSender, Queue, QueueSet, WatchReceiver,
};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tracing::field::Field;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
enum Unit {
    Celsius,
    Fahrenheit,
}

async fn measure(measured: Queue<(Unit, i32)>, unit: WatchReceiver<Unit>) -> mp::Result<()> {
    loop {
        let unit = unit.get()?;
        measured.put((unit, if unit == Unit::Celsius { 20 } else { 68 })).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn station(
    ready: OneshotSender<bool>,
    measured: Queue<(Unit, i32)>,
    unit: WatchReceiver<Unit>,
    mut news: BroadcastReceiver<String>,
    end: CancellationToken,
) -> mp::Result<Vec<String>> {
    ready.send(true)?;
    // It may end in the middle of a put, which has then put nothing.
    if let Some(failed) = end.run_until_cancelled(measure(measured, unit)).await {
        failed?;
    }
    let heard: Vec<_> = std::iter::from_fn(|| news.try_recv().ok()).collect();
    tracing::info!(news = heard.len(), "a station has ended");
    Ok(heard)
}

static LINES: AtomicUsize = AtomicUsize::new(0);

/// Writes events to the standard error. A program has a subscriber with more to it.
struct Log;

impl<S: tracing::Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        LINES.fetch_add(usize::from(event.metadata().target() == module_path!()), Relaxed);
        event.record(&mut |field: &Field, value: &dyn Debug| eprint!("{field}={value:?} "));
        eprintln!();
    }
}

fn main() -> mp::Result<()> {
    mp::run(async {
        // After `run` has begun: what is set before it is set in each child, and is the child's own subscriber.
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Log)).map_err(mp::Error::other)?;
        let (units, unit) = mp::watch(Unit::Celsius)?;
        let (announcer, news) = mp::broadcast(16)?;
        let (end, mut stations, mut measured) = (CancellationToken::new()?, Group::new(), QueueSet::new());
        for name in ["north", "south", "west"] {
            let ((ready, is_ready), queue) = (mp::oneshot()?, Queue::bounded(8)?);
            measured.insert(name, &queue)?;
            stations.spawn(station, (ready, queue, unit.clone(), news.resubscribe(), end.clone()))?;
            println!("station {name} is ready: {}", is_ready.await?);
        }

        let mut seen = HashSet::new();
        while seen.len() < 6 {
            let (name, (unit, _)) = measured.get().await?;
            seen.insert((name, unit));
            if seen.len() == 3 {
                units.send(Unit::Fahrenheit)?;
            }
        }
        println!("each has measured in both units");

        announcer.send("a storm comes".to_string())?;
        end.cancel();
        for heard in stations.join_all().await {
            println!("a station heard that {}", heard??.join(", "));
        }
        println!("{} lines of log from them", LINES.load(Relaxed));
        Ok(())
    })
}
