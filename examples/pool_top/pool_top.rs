//! A pool in a terminal, like `top`: a lane for each worker, what it runs and since when, items a second, and deaths with their reasons.
//!
//! It shows a pool of its own with some work. `k` kills a worker that is busy, `q` ends it.
//!
//! ```text
//! cargo run -p multiprocess-pool-top --example pool_top
//! ```
//!
//! All it shows is in `Pool::stats`, which any program can read a few times a second.

use multiprocess::{self as mp, Pool, PoolStats, WorkerDeath};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table, Wrap};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, VecDeque};
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const TICK: Duration = Duration::from_millis(200);
/// The newest cells of a lane and points of the rate that are kept: more than a screen shows.
const KEPT: usize = 512;

/// Of Okabe and Ito, which the colour-blind can tell apart; each state has a sign of its own, too.
const BLUE: Color = Color::Rgb(0x56, 0xb4, 0xe9);
const VERMILION: Color = Color::Rgb(0xd5, 0x5e, 0x00);

#[derive(Clone, Copy, PartialEq)]
enum Did {
    Nothing,
    Something,
    Died,
}

/// What is shown: the last sample, and what came before it.
#[derive(Default)]
struct Top {
    stats: PoolStats,
    lanes: BTreeMap<(usize, String), VecDeque<Did>>,
    rates: VecDeque<u64>,
    /// As of the last sample.
    completed: BTreeMap<u32, u64>,
    done: u64,
    last_death: Option<Instant>,
}

impl Top {
    fn take_in(&mut self, stats: PoolStats) {
        for worker in &stats.workers {
            let before = self.completed.insert(worker.pid, worker.tasks).unwrap_or(0);
            let did = if worker.is_busy || worker.tasks > before { Did::Something } else { Did::Nothing };
            self.lane(&worker.name).push_back(did);
        }
        self.completed.retain(|pid, _| stats.workers.iter().any(|worker| worker.pid == *pid));
        for death in stats.deaths.iter().filter(|death| Some(death.at) > self.last_death) {
            self.lanes.entry((death.name.len(), death.name.clone())).or_default().push_back(Did::Died);
        }
        self.last_death = stats.deaths.last().map(|death| death.at).or(self.last_death);
        self.rates.push_back(stats.totals.done.saturating_sub(self.done));
        self.done = stats.totals.done;
        self.rates.drain(..self.rates.len().saturating_sub(KEPT));
        self.lanes.values_mut().for_each(|lane| _ = lane.drain(..lane.len().saturating_sub(KEPT)));
        self.stats = stats;
    }

    fn lane(&mut self, worker: &str) -> &mut VecDeque<Did> {
        self.lanes.entry((worker.len(), worker.to_string())).or_default()
    }

    fn draw(&self, frame: &mut Frame) {
        let workers = self.stats.workers.len() as u16;
        let rows = [
            Constraint::Length(1),
            Constraint::Length(workers + 3),
            Constraint::Length(6),
            Constraint::Min(4),
            Constraint::Length(1),
        ];
        let [head, lanes, rate, deaths, foot] = Layout::vertical(rows).areas(frame.area());
        let PoolStats { queued, running, runs, waits, totals, .. } = &self.stats;
        let text = format!(
            "pool_top: {workers} workers, {running} items running, {queued} waiting, {} done; ran {:.0?}, waited {:.0?} (99 %)",
            totals.done,
            runs.quantile(0.99),
            waits.quantile(0.99)
        );
        frame.render_widget(Paragraph::new(text).style(Modifier::BOLD), head);
        self.draw_workers(frame, lanes);
        let rates: Vec<u64> =
            self.rates.iter().rev().take(usize::from(rate.width.saturating_sub(2))).rev().copied().collect();
        let title = format!(" items done per {TICK:?}, {} at most ", rates.iter().max().unwrap_or(&0));
        frame.render_widget(Sparkline::default().data(rates).style(BLUE).block(Block::bordered().title(title)), rate);
        self.draw_deaths(frame, deaths);
        frame.render_widget(Paragraph::new("k kills a busy worker, q ends"), foot);
    }

    fn draw_workers(&self, frame: &mut Frame, area: Rect) {
        const COLUMNS: [u16; 5] = [13, 8, 18, 8, 9];
        let gaps = COLUMNS.len() as u16;
        let width = usize::from(area.width.saturating_sub(COLUMNS.iter().sum::<u16>() + gaps + 2));
        let rows = self.stats.workers.iter().map(|worker| {
            let runs = worker.task.map_or("-", |task| task.rsplit("::").next().unwrap_or(task)).to_string();
            let since = worker.running_for.map_or(String::new(), |time| format!("{:.1} s", time.as_secs_f64()));
            let memory = format!("{} MiB", worker.resident >> 20);
            let cells = [worker.name.clone(), worker.pid.to_string(), runs, since, memory].map(Cell::from);
            let did = self.lanes.get(&(worker.name.len(), worker.name.clone()));
            let newest = did.into_iter().flat_map(|did| did.iter().skip(did.len().saturating_sub(width)));
            let lane = newest.map(|did| match did {
                Did::Nothing => Span::raw("·"),
                Did::Something => Span::styled("█", BLUE),
                Did::Died => Span::styled("X", Style::new().bg(VERMILION).add_modifier(Modifier::BOLD)),
            });
            Row::new(cells.into_iter().chain([Cell::from(Line::from_iter(lane))]))
        });
        let widths = COLUMNS.map(Constraint::Length).into_iter().chain([Constraint::Min(0)]);
        let head = Row::new(["worker", "pid", "runs", "since", "memory", "█ busy  · idle  X died"]);
        let table = Table::new(rows, widths).header(head.style(Modifier::BOLD));
        frame.render_widget(table.block(Block::bordered().title(" workers ")), area);
    }

    fn draw_deaths(&self, frame: &mut Frame, area: Rect) {
        let lines: Vec<_> = self.stats.deaths.iter().rev().map(line_of).collect();
        let deaths = Paragraph::new(lines).wrap(Wrap { trim: true });
        frame.render_widget(deaths.block(Block::bordered().title(" deaths ")), area);
    }
}

fn line_of(death: &WorkerDeath) -> Line<'static> {
    let ago = format!("{:.0} s ago: ", death.at.elapsed().as_secs_f64());
    Line::from_iter([Span::styled(ago, VERMILION), Span::raw(death.why.replace('\n', " "))])
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    mp::run(async {
        let pool = Pool::builder().workers(4).build()?;
        let work = tokio::spawn(work(pool.clone()));
        let keys = keys();
        // It restores the terminal also after a panic.
        let mut terminal = ratatui::try_init()?;
        let shown = show(&pool, keys, &mut terminal).await;
        ratatui::restore();
        work.abort();
        pool.terminate();
        Ok(shown?)
    })
}

async fn show(
    pool: &Pool,
    mut keys: UnboundedReceiver<KeyCode>,
    terminal: &mut ratatui::DefaultTerminal,
) -> std::io::Result<()> {
    let mut top = Top::default();
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            _ = tick.tick() => top.take_in(pool.stats()),
            key = keys.recv() => match key {
                None | Some(KeyCode::Char('q')) => return Ok(()),
                Some(KeyCode::Char('k')) => kill_one(&top.stats),
                Some(_) => {}
            },
            signal = mp::shutdown_signal() => return signal.map(drop).map_err(std::io::Error::other),
        }
        terminal.draw(|frame| top.draw(frame))?;
    }
}

fn kill_one(stats: &PoolStats) {
    let busy = stats.workers.iter().find(|worker| worker.is_busy);
    if let Some(pid) = busy.and_then(|worker| Pid::from_raw(worker.pid.cast_signed())) {
        // It may just have ended.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// The keys that are pressed. To wait for them blocks a thread.
fn keys() -> UnboundedReceiver<KeyCode> {
    let (sender, keys) = unbounded_channel();
    thread::spawn(move || {
        while let Ok(event) = event::read() {
            if let Event::Key(key) = event
                && key.kind == KeyEventKind::Press
                && sender.send(key.code).is_err()
            {
                return;
            }
        }
    });
    keys
}

fn rest(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}

/// Some work, without an end.
async fn work(pool: Pool) {
    let mut calls = VecDeque::new();
    for n in 0_u64.. {
        calls.push_back(pool.apply_async(rest, (100 + n * 977 % 1500,)));
        if calls.len() > 6 {
            // One whose worker was killed is shown among the deaths.
            let _ = calls.pop_front().expect("there are seven").await;
        }
    }
}
