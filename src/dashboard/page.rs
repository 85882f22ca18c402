//! The page around the pictures. What a picture shows stands beside it as text.

use super::drawings::STEP;
use super::history::{PoolHistory, QueueHistory, WorkerSums};
use super::lanes::Doing;
use super::pictures::{self, Curve, Ink, Scale, bytes, count, duration, escaped, time};
use crate::pool::{PoolStats, WorkerDeath, WorkerStats};
use crate::sync::debug::{Dump, Object};
use std::fmt::Write;
use std::time::Instant;

pub(super) const STYLE: &str = include_str!("style.css");
pub(super) const SCRIPT: &str = include_str!("script.js");

/// The width of the contents if none is asked for, the least and the most.
const WIDTHS: [u32; 3] = [1180, 300, 2400];
/// From this width on there are two curves side by side, with a gap: as in the style.
const TWO_COLUMNS: u32 = 760;
const GAP: u32 = 24;
/// So many rows of a table are shown, and so many deaths, each with so many letters of its reason.
const ROWS: usize = 64;
const DEATHS: usize = 10;
const WHY: usize = 4000;

/// What is to be shown.
pub(super) struct View<'a> {
    pub(super) now: Instant,
    /// When the page was begun to be served.
    pub(super) started: Instant,
    pub(super) pools: &'a [PoolHistory],
    pub(super) queues: &'a [QueueHistory],
    pub(super) managers: &'a [ManagerState],
    pub(super) locks: &'a Dump,
}

/// A manager, and how many objects it has; `None` before it was asked.
#[derive(Clone)]
pub(super) struct ManagerState {
    pub(super) name: String,
    pub(super) objects: Option<Result<usize, String>>,
}

/// The width for which a query asks, `width=400`, rounded so that few widths differ.
pub(super) fn width_in(query: Option<&str>) -> u32 {
    let [usual, least, most] = WIDTHS;
    let pairs = query.unwrap_or_default().split('&');
    let wanted = pairs.filter_map(|pair| pair.strip_prefix("width=")).find_map(|width| width.parse::<u32>().ok());
    wanted.unwrap_or(usual).clamp(least, most) / STEP * STEP
}

/// The page before its contents.
pub(super) fn head() -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>multiprocess: pid {pid}</title><link rel=\"icon\" href=\"data:,\">\
         <link rel=\"stylesheet\" href=\"style.css\">\
         <noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript></head><body>\
         <header><h1>multiprocess: pid {pid}</h1><span id=\"state\">as of when it was loaded</span>\
         <button id=\"pause\" type=\"button\" hidden>pause</button></header>\
         <main>",
        pid = std::process::id()
    )
}

/// The page after its contents.
pub(super) const FOOT: &str = "</main><script src=\"script.js\"></script></body></html>\n";

/// What changes.
pub(super) fn content(view: &View, width: u32) -> String {
    let mut page = String::new();
    let since = duration(view.now.saturating_duration_since(view.started));
    line(&mut page, format_args!("<p class=\"none\">Watched for {since}.</p>"));
    view.pools.iter().for_each(|pool| add_pool(&mut page, view.now, pool, width));
    add_queues(&mut page, view, width);
    add_managers(&mut page, view.managers);
    add_locks(&mut page, view.locks);
    page
}

/// Writing into a text does not fail.
fn line(page: &mut String, text: std::fmt::Arguments) {
    let _ = page.write_fmt(text);
    page.push('\n');
}

fn half(width: u32) -> u32 {
    if width >= TWO_COLUMNS { (width - GAP) / 2 } else { width }
}

fn add_pool(page: &mut String, now: Instant, pool: &PoolHistory, width: u32) {
    line(page, format_args!("<section class=\"pool\"><h2>Pool {}</h2>", escaped(&pool.name)));
    match (&pool.stats, pool.gone) {
        (Some(stats), _) => add_numbers(page, stats, pool.workers),
        (None, None) => line(page, format_args!("<p class=\"none\">The first sample of this pool is due.</p>")),
        (None, Some(gone)) => {
            let (ago, is_past) = (duration(now.saturating_duration_since(gone)), pool.is_past(now));
            let what = if is_past { "" } else { " Below is what was seen of it before." };
            line(page, format_args!("<p class=\"gone\">This pool was dropped {ago} ago.{what}</p>"));
            if is_past {
                return line(page, format_args!("</section>"));
            }
        }
    }
    add_lanes(page, now, pool, width);
    if let Some(stats) = &pool.stats {
        add_workers(page, now, pool, stats);
    }
    line(page, format_args!("<div class=\"grid\">"));
    add_curves(page, now, pool, half(width));
    if let Some(stats) = pool.stats.as_ref().filter(|stats| !stats.workers.is_empty()) {
        add_memory(page, stats, pool.workers.resident, half(width));
    }
    line(page, format_args!("</div>"));
    add_deaths(page, now, pool);
    line(page, format_args!("</section>"));
}

fn add_numbers(page: &mut String, stats: &PoolStats, workers: WorkerSums) {
    let totals = &stats.totals;
    let failed = totals.panicked + totals.died + totals.timed_out + totals.cancelled + totals.failed;
    let numbers = [
        ("workers, of them busy", format!("{} / {}", workers.count, workers.busy)),
        ("items waiting", stats.queued.to_string()),
        ("items running", stats.running.to_string()),
        ("items done", totals.done.to_string()),
        ("items that failed", failed.to_string()),
        ("workers that died", totals.restarted.to_string()),
        ("memory of workers", bytes(workers.resident)),
    ];
    line(page, format_args!("<dl class=\"numbers\">"));
    for (name, value) in numbers {
        line(page, format_args!("<div><dt>{name}</dt><dd>{value}</dd></div>"));
    }
    line(page, format_args!("</dl>"));
}

fn add_lanes(page: &mut String, now: Instant, pool: &PoolHistory, width: u32) {
    if pool.lanes.len() == 0 {
        return;
    }
    let picture = pictures::lanes(now, &pool.lanes, &pool.functions, width);
    line(page, format_args!("<figure class=\"lanes\"><h3>What each worker did in the last minute</h3>{picture}"));
    line(page, format_args!("<ul class=\"legend\">"));
    for (at, function) in pool.functions.iter().enumerate() {
        let (colour, letter) = pictures::function_mark(at);
        let name = function_name(function);
        line(
            page,
            format_args!(
                "<li><svg class=\"swatch\" width=\"14\" height=\"12\" aria-hidden=\"true\"><rect width=\"14\" height=\"12\" \
             fill=\"{colour}\"/></svg>{letter}: {name}</li>"
            ),
        );
    }
    line(
        page,
        format_args!(
            "</ul><figcaption>Filled: one item, with the letter of its function. Pale, between lines: several short \
                             items. Thin line: idle. A mark \"died\" on a red lane, whose name has a \u{d7}: a worker died there."
        ),
    );
    let dead: Vec<_> = pool.lanes.iter().filter(|(_, lane)| lane.died().is_some()).map(|(name, _)| name).collect();
    match dead.is_empty() {
        true => line(page, format_args!(" No worker died in this minute.")),
        false => line(page, format_args!(" Died in this minute: {}.", escaped(&dead.join(", ")))),
    }
    if pool.lanes.hidden > 0 {
        line(page, format_args!(" {} more workers are not shown.", pool.lanes.hidden));
    }
    line(page, format_args!("</figcaption></figure>"));
}

/// The path of a function. A line may end behind each part of it.
fn function_name(path: &str) -> String {
    escaped(path).replace("::", "::<wbr>")
}

/// Who runs what, and since when.
fn add_workers(page: &mut String, now: Instant, pool: &PoolHistory, stats: &PoolStats) {
    if stats.workers.is_empty() {
        return line(page, format_args!("<p class=\"none\">This pool has no worker process.</p>"));
    }
    line(
        page,
        format_args!(
            "<table class=\"workers\"><thead><tr><th>worker</th><th class=\"number\">pid</th><th>runs</th><th class=\"number\">since</th>\
         <th class=\"number\">items</th><th class=\"number\">age</th></tr></thead><tbody>"
        ),
    );
    for worker in stats.workers.iter().take(ROWS) {
        let lane = pool.lanes.iter().find(|(name, _)| *name == worker.name).map(|(_, lane)| lane);
        let doing =
            lane.and_then(|lane| lane.spans.back()).map(|span| (span.doing, now.saturating_duration_since(span.from)));
        let (task, since) = match (worker.task, worker.running_for, doing) {
            (_, _, Some((Doing::Items(task), since))) => (
                task.map_or("short items".into(), |task| format!("{}, short items", function_name(task))),
                duration(since),
            ),
            (Some(task), Some(since), _) => (function_name(task), duration(since)),
            (_, _, Some((_, since))) => ("nothing".into(), duration(since)),
            _ => ("nothing".into(), String::new()),
        };
        line(
            page,
            format_args!(
                "<tr><td>{}</td><td class=\"number\">{}</td><td>{task}</td><td class=\"number\">{since}</td><td class=\"number\">{}</td>\
             <td class=\"number\">{}</td></tr>",
                escaped(&worker.name),
                worker.pid,
                worker.tasks,
                duration(worker.age)
            ),
        );
    }
    line(page, format_args!("</tbody></table>"));
    if let Some(more) = pool.workers.count.checked_sub(ROWS).filter(|more| *more > 0) {
        line(page, format_args!("<p class=\"none\">And {more} more.</p>"));
    }
}

fn minutes_ago(now: Instant, at: Instant) -> f64 {
    -now.saturating_duration_since(at).as_secs_f64() / 60.0
}

/// A figure with curves: each with its ink, what it is, and what it says now.
fn add_figure(page: &mut String, title: &str, picture: &str, legend: &[(Ink, String)], caption: &str) {
    line(page, format_args!("<figure><h3>{title}</h3>{picture}<ul class=\"legend\">"));
    for (ink, text) in legend {
        line(page, format_args!("<li>{}{}</li>", ink.swatch(), escaped(text)));
    }
    line(page, format_args!("</ul><figcaption>{caption}</figcaption></figure>"));
}

fn add_curves(page: &mut String, now: Instant, pool: &PoolHistory, width: u32) {
    type Figure = fn(&super::history::Point) -> Option<f64>;
    let curve = |ink, value: Figure| {
        let points = pool.points.iter().map(|point| (minutes_ago(now, point.at), value(point))).collect();
        Curve { ink, points }
    };
    let last = pool.points.back();
    let now_is = |value: Figure| last.and_then(value);
    let number = |value: Figure| now_is(value).map_or("none".to_string(), count);
    let seconds = |value: Figure| now_is(value).map_or("none".to_string(), time);

    let rates: [(Ink, &str, Figure); 2] =
        [(Ink::Blue, "done", |point| Some(point.done)), (Ink::Failure, "failed", |point| Some(point.failed))];
    let picture = pictures::curves(width, Scale::Count, &rates.map(|(ink, _, value)| curve(ink, value)));
    let legend = rates.map(|(ink, name, value)| (ink, format!("{name}: {} a second now", number(value))));
    add_figure(
        page,
        "Items a second",
        &picture,
        &legend,
        "The last five minutes. Items count as failed if they panicked, died, were late or cancelled.",
    );

    let times: [(Ink, &str, Figure); 4] = [
        (Ink::Blue, "ran, median", |point| Some(point.runs?[0])),
        (Ink::BlueDashed, "ran, 99 %", |point| Some(point.runs?[1])),
        (Ink::Green, "waited, median", |point| Some(point.waits?[0])),
        (Ink::GreenDashed, "waited, 99 %", |point| Some(point.waits?[1])),
    ];
    let picture = pictures::curves(width, Scale::Time, &times.map(|(ink, _, value)| curve(ink, value)));
    let legend = times.map(|(ink, name, value)| (ink, format!("{name}: {}", seconds(value))));
    add_figure(
        page,
        "How long items ran and waited",
        &picture,
        &legend,
        "The last five minutes, on a logarithmic scale, to within a factor of two. A gap: no item ended.",
    );

    let items: [(Ink, &str, Figure); 2] = [
        (Ink::Blue, "waiting", |point| Some(point.waiting as f64)),
        (Ink::GreenDashed, "running", |point| Some(point.running as f64)),
    ];
    let picture = pictures::curves(width, Scale::Count, &items.map(|(ink, _, value)| curve(ink, value)));
    let legend = items.map(|(ink, name, value)| (ink, format!("{name}: {}", number(value))));
    add_figure(page, "Items waiting and running", &picture, &legend, "The last five minutes.");
}

fn add_memory(page: &mut String, stats: &PoolStats, total: u64, width: u32) {
    let workers: Vec<&WorkerStats> = stats.workers.iter().take(ROWS).collect();
    let picture = pictures::memory(width, &workers);
    line(
        page,
        format_args!(
            "<figure><h3>Memory of the workers</h3>{picture}<figcaption>Filled: resident now. Pale: the most that it ever was. \
         All workers together: {} now.</figcaption></figure>",
            bytes(total)
        ),
    );
}

fn add_deaths(page: &mut String, now: Instant, pool: &PoolHistory) {
    line(page, format_args!("<h3>Deaths of workers</h3>"));
    if pool.deaths.is_empty() {
        return line(page, format_args!("<p class=\"none\">No worker died.</p>"));
    }
    line(page, format_args!("<ol class=\"deaths\">"));
    for death in pool.deaths.iter().rev().take(DEATHS) {
        add_death(page, now, death);
    }
    line(page, format_args!("</ol>"));
}

fn add_death(page: &mut String, now: Instant, death: &WorkerDeath) {
    let status = death.status.map_or("exit status unknown".to_string(), |status| status.to_string());
    let why = match death.why.char_indices().nth(WHY) {
        Some((end, _)) => format!("{} ..", &death.why[..end]),
        None => death.why.clone(),
    };
    line(
        page,
        format_args!(
            "<li><b>{}</b>, pid {}, {}, {} ago: {}</li>",
            escaped(&death.name),
            death.pid,
            escaped(&status),
            duration(now.saturating_duration_since(death.at)),
            escaped(&why)
        ),
    );
}

fn add_queues(page: &mut String, view: &View, width: u32) {
    if view.queues.is_empty() {
        return;
    }
    line(page, format_args!("<section class=\"queues\"><h2>Queues</h2><div class=\"grid\">"));
    for queue in view.queues {
        let points = queue.points.iter().map(|(at, len)| (minutes_ago(view.now, *at), Some(*len as f64))).collect();
        let picture = pictures::curves(half(width), Scale::Count, &[Curve { ink: Ink::Blue, points }]);
        let len = queue.points.back().map_or(0, |(_, len)| *len);
        let capacity =
            queue.capacity.map_or("without a limit".to_string(), |capacity| format!("of at most {capacity}"));
        let legend = [(Ink::Blue, format!("items: {len} now, {capacity}"))];
        let title = format!("Queue {}", escaped(&queue.name));
        add_figure(page, &title, &picture, &legend, "Its items in the last five minutes.");
    }
    line(page, format_args!("</div></section>"));
}

fn add_managers(page: &mut String, managers: &[ManagerState]) {
    if managers.is_empty() {
        return;
    }
    line(
        page,
        format_args!(
            "<section class=\"managers\"><h2>Managers</h2><table><thead><tr><th>manager</th><th>state</th></tr></thead><tbody>"
        ),
    );
    for manager in managers {
        let state = match &manager.objects {
            None => "not yet asked".to_string(),
            Some(Ok(1)) => "1 object".to_string(),
            Some(Ok(objects)) => format!("{objects} objects"),
            Some(Err(error)) => format!("does not answer: {}", escaped(error)),
        };
        let class = if matches!(manager.objects, Some(Err(_))) { " class=\"dead\"" } else { "" };
        line(page, format_args!("<tr{class}><td>{}</td><td>{state}</td></tr>", escaped(&manager.name)));
    }
    line(page, format_args!("</tbody></table></section>"));
}

fn add_locks(page: &mut String, locks: &Dump) {
    line(page, format_args!("<section class=\"locks\"><h2>Locks</h2>"));
    if locks.objects().is_empty() {
        return line(
            page,
            format_args!("<p class=\"none\">Nothing is held or waited for in this program.</p></section>"),
        );
    }
    line(page, format_args!("<table><thead><tr><th>object</th><th>held by</th><th>waiting</th></tr></thead><tbody>"));
    for object in locks.objects().iter().take(ROWS) {
        line(
            page,
            format_args!(
                "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
                escaped(object.kind()),
                escaped(&holders(object)),
                escaped(&waiters(object))
            ),
        );
    }
    line(page, format_args!("</tbody></table>"));
    if let Some(more) = locks.objects().len().checked_sub(ROWS).filter(|more| *more > 0) {
        line(page, format_args!("<p class=\"none\">And {more} more.</p>"));
    }
    line(page, format_args!("</section>"));
}

fn holders(object: &Object) -> String {
    match (object.holder(), object.held_for()) {
        (Some(holder), Some(time)) => format!("{holder} for {}", duration(time)),
        (Some(holder), None) => format!("{holder}, writing"),
        _ if object.shares().is_empty() => "nobody".to_string(),
        _ => {
            let shares: Vec<_> = object.shares().iter().map(|(who, held)| format!("{held} by {who}")).collect();
            shares.join(", ")
        }
    }
}

fn waiters(object: &Object) -> String {
    match object.waiting() {
        [] => "nobody".to_string(),
        waiting => waiting.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dashboard::history::WINDOW;
    use crate::pool::Deaths;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;
    use std::time::Duration;

    #[test]
    fn a_width_is_read_from_a_query_and_bounded() {
        let widths = [
            None,
            Some(""),
            Some("width=400"),
            Some("a=b&width=401&"),
            Some("width=x"),
            Some("width=1"),
            Some("width=4294967295"),
            Some("width=-1"),
        ];
        assert_eq!(widths.map(width_in), [1180, 1180, 400, 400, 1180, 300, 2400, 1180]);
    }

    #[test]
    fn names_are_text_and_not_markup() {
        assert_eq!(escaped("<b a=\"1\">'&"), "&lt;b a=&quot;1&quot;&gt;&#39;&amp;");
        let pools = [PoolHistory::new("<script>".into())];
        let (now, managers) = (Instant::now(), [ManagerState { name: "<m>".into(), objects: Some(Err("<e>".into())) }]);
        let queues = [QueueHistory::new("<q>".into(), None)];
        let view =
            View { now, started: now, pools: &pools, queues: &queues, managers: &managers, locks: &Dump::default() };
        let text = content(&view, 400);
        for markup in ["<script", "<m>", "<e>", "<q>"] {
            assert!(!text.contains(markup), "{markup}");
        }
        assert!(text.contains("Pool &lt;script&gt;"));
    }

    #[test]
    fn a_pool_that_was_dropped_is_shown_as_such_and_after_five_minutes_alone() {
        let (start, mut pool) = (Instant::now(), PoolHistory::new("p".into()));
        let shown = |pool: &PoolHistory, now| {
            let mut page = String::new();
            add_pool(&mut page, now, pool, 400);
            page
        };
        assert!(shown(&pool, start).contains("The first sample of this pool is due."));
        let death = WorkerDeath { name: "w".into(), pid: 7, at: start, status: None, why: "killed".into() };
        pool.record(start, Some((PoolStats::default(), Deaths::new(vec![death]))));
        let page = shown(&pool, start);
        assert!(page.contains("pid 7") && !page.contains("dropped"), "{page}");
        pool.record(start, None);
        let page = shown(&pool, start + Duration::from_secs(120));
        assert!(page.contains("This pool was dropped 2.0 min ago. Below") && page.contains("pid 7"), "{page}");
        let page = shown(&pool, start + WINDOW);
        assert!(page.contains("This pool was dropped 5.0 min ago.</p>"), "{page}");
        assert!(!page.contains("pid 7") && !page.contains("<svg") && page.ends_with("</section>\n"), "{page}");
    }

    #[test]
    fn a_death_is_shown_with_its_worker_and_how_and_why_it_ended() {
        let (now, mut page, mut pool) = (Instant::now(), String::new(), PoolHistory::new("p".into()));
        let death = |pid, name: &str, status, why: String| WorkerDeath { name: name.into(), pid, at: now, status, why };
        let deaths = [
            death(7, "PoolWorker-1", Some(ExitStatus::from_raw(9)), "killed <by> \"me\" & 'you'".into()),
            death(8, "<b>", Some(ExitStatus::from_raw(3 << 8)), "x".repeat(2 * WHY)),
            death(9, "PoolWorker-3", None, "nobody knows".into()),
        ];
        pool.deaths = Deaths::new(deaths.into());
        add_deaths(&mut page, now, &pool);
        let items: Vec<_> = page.lines().filter(|line| line.starts_with("<li>")).collect();
        let wanted = [
            "<li><b>PoolWorker-3</b>, pid 9, exit status unknown, 0 ns ago: nobody knows</li>".to_string(),
            format!("<li><b>&lt;b&gt;</b>, pid 8, exit status: 3, 0 ns ago: {} ..</li>", "x".repeat(WHY)),
            "<li><b>PoolWorker-1</b>, pid 7, signal: 9 (SIGKILL), 0 ns ago: killed &lt;by&gt; &quot;me&quot; &amp; &#39;you&#39;</li>".to_string(),
        ];
        assert_eq!(items, wanted);
    }
}
