//! `pool_top` in a terminal of tmux: what stands on the screen, keys, the end.

#[path = "../../tests/programs/mod.rs"]
mod programs;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// A tmux server of its own, which ends with the test.
struct Terminal(String);

impl Terminal {
    fn start(columns: u32, rows: u32, program: &Path) -> Self {
        let terminal = Self(format!("multiprocess-{}-{columns}", std::process::id()));
        let size = ["-x", &columns.to_string(), "-y", &rows.to_string()].map(str::to_string);
        let program = program.display().to_string();
        let start = ["-f", "/dev/null", "new-session", "-d", "-s", "top"].map(str::to_string);
        let started = terminal.tmux(start.into_iter().chain(size).chain([program]));
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        terminal
    }

    fn tmux(&self, arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Output {
        let mut tmux = Command::new("tmux");
        tmux.env("LC_ALL", "C.UTF-8").env_remove("TMUX").args(["-u", "-L", &self.0]).args(arguments);
        tmux.output().unwrap()
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.tmux(["capture-pane", "-p", "-t", "top"]).stdout).into_owned()
    }

    /// The screen, once it is as wanted.
    fn wait(&self, what: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        loop {
            let screen = self.screen();
            if is_wanted(&screen) {
                return screen;
            }
            assert!(start.elapsed() < LIMIT, "never: {what}\n{screen}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn press(&self, key: &str) {
        self.tmux(["send-keys", "-t", "top", key]);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(["kill-server"]);
    }
}

fn try_out(columns: u32, rows: u32) {
    let top = Terminal::start(columns, rows, &programs::example("pool_top"));
    let screen = top.wait("lanes of busy workers", |screen| {
        (1..=4).all(|n| screen.contains(&format!("PoolWorker-{n}"))) && screen.contains("██") && screen.contains("rest")
    });
    assert!(screen.contains("items running") && screen.contains("q ends"), "{screen}");
    assert!(screen.lines().all(|line| line.chars().count() <= columns as usize), "{screen}");
    assert!(!screen.contains("SIGKILL"), "{screen}");
    top.press("k");
    let screen = top.wait("a death in a lane, and its reason", |screen| {
        let in_lane = |line: &str| line.contains("PoolWorker-") && line.contains('X');
        screen.lines().any(in_lane) && screen.contains("SIGKILL")
    });
    assert!(screen.contains("died while it ran item 0"), "{screen}");
    top.press("q");
    // The server ends with its last session.
    let start = Instant::now();
    while top.tmux(["has-session", "-t", "top"]).status.success() {
        assert!(start.elapsed() < LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_screen_shows_workers_at_work_and_one_that_was_killed() {
    if Command::new("tmux").arg("-V").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "this test needs tmux");
        return eprintln!("SKIPPED: tmux is not installed; pool_top was not tried in a terminal");
    }
    try_out(120, 40);
    try_out(80, 24);
}
