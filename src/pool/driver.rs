//! The one task of a pool: starts workers, hears of their ends, and keeps deadlines. It only ever sleeps when there is
//! nothing of this to do, and results do not pass through it.

use super::engine::{Hire, Shared};
use super::protocol::{Conditions, Contract};
use super::worker;
use crate::channel::{self, lane};
use crate::error::{Error, Result};
use crate::os::memory;
use crate::process::Process;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

/// Whatever ends the driver, nobody waits for ever.
struct Driving(Arc<Shared>);

impl Drop for Driving {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

pub(super) async fn drive(shared: Arc<Shared>) {
    let driving = Driving(shared);
    let shared = &driving.0;
    let mut exits = FuturesUnordered::new();
    let mut starved = memory::oom_kills();
    loop {
        let step = shared.step();
        for (seat, generation, report) in step.begun {
            let read = shared.settings.read_initialized;
            shared.began(seat, generation, report.and_then(|report| read(report.open()?)));
        }
        for hire in step.hires {
            match start(shared, &hire) {
                Ok(process) => exits.push(end_of(hire, process)),
                Err(error) => shared.not_hired(&hire, &error),
            }
        }
        if step.is_over && exits.is_empty() {
            return;
        }
        let alarm = async {
            match step.until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some((seat, generation, status)) = exits.next() => {
                let is_kill = status.as_ref().is_ok_and(|status| status.signal() == Some(Signal::KILL.as_raw()));
                let was_starved = is_kill && std::mem::replace(&mut starved, memory::oom_kills()) < starved;
                shared.died(seat, generation, status, was_starved);
            }
            () = shared.nudge.notified() => {}
            () = alarm => {}
        }
    }
}

async fn end_of(hire: Hire, mut process: Process<Result<()>>) -> (usize, u64, Result<ExitStatus>) {
    let status = process.wait().await;
    (hire.seat, hire.generation, status)
}

fn start(shared: &Shared, hire: &Hire) -> Result<Process<Result<()>>> {
    let (lane, theirs) =
        lane::create(&shared.board).map_err(|error| Error::io("cannot create the lane of a worker", error))?;
    let (orders, worker_orders) = channel::simplex()?;
    let (worker_results, results) = channel::simplex()?;
    let name = format!("PoolWorker-{}", hire.seat + 1);
    let settings = &shared.settings;
    let contract = Contract {
        lane: theirs,
        orders: worker_orders,
        results: worker_results,
        initializer: settings.initializer.clone(),
        finalizer: settings.finalizer.clone(),
        conditions: Conditions {
            cpu: settings.cpus.get(hire.seat % settings.cpus.len().max(1)).copied(),
            ..settings.conditions.clone()
        },
    };
    let mut builder = Process::<()>::builder().name(&name).daemon(true).start_method(settings.start_method);
    for (key, value) in &settings.variables {
        builder = builder.env(key, value);
    }
    let process = builder.spawn(worker::work, (contract,))?;
    let name = format!("{name} (pid {})", process.pid());
    shared.hired(hire, name, process.killer(), lane, orders, results);
    Ok(process)
}
