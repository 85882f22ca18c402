//! A page in headless Chromium, by the DevTools protocol over pipes.

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox", // Needed by root.
    "--disable-gpu",
    "--disable-extensions",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

/// Where Chromium is, if it is installed: `CHROMIUM`, or one of its usual names.
pub fn installed() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = std::env::split_paths(&path)
        .flat_map(|directory| ["chromium", "chromium-browser", "google-chrome"].map(|name| directory.join(name)));
    named.into_iter().chain(usual).find(|file| file.is_file())
}

/// Blocks: use it on a thread of its own. Its drop ends all processes of the browser.
pub struct Browser {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    session: Option<String>,
    number: u64,
    profile: PathBuf,
    /// Ends the thread that would kill it.
    _is_over: mpsc::Sender<()>,
    /// What the browser complained of: failed loads, scripts that failed, what the page's policy refused.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts one with an empty profile below `directory`. It is killed after `limit`, and what is asked of it fails then.
    pub fn start(program: &Path, directory: &Path, limit: Duration) -> Self {
        let profile = directory.join(format!("chromium-{}", std::process::id()));
        std::fs::create_dir_all(&profile).unwrap();
        // The protocol is spoken on descriptors 3 and 4.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh"]).arg(program).args(FLAGS);
        shell.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn().unwrap();
        let (is_over, over) = mpsc::channel::<()>();
        let group = Pid::from_child(&child);
        std::thread::spawn(move || {
            if over.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the browser is killed, as it has taken {limit:?}");
                let _ = kill_process_group(group, Signal::KILL);
            }
        });
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let (session, number, complaints) = (None, 0, Vec::new());
        let mut browser = Self { child, orders, answers, session, number, profile, complaints, _is_over: is_over };
        let target = browser.order("Target.createTarget", json!({"url": "about:blank"}))["targetId"].clone();
        let session = browser.order("Target.attachToTarget", json!({"targetId": target, "flatten": true}));
        browser.session = Some(session["sessionId"].as_str().unwrap().to_string());
        browser.order("Page.enable", json!({}));
        browser.order("Log.enable", json!({}));
        browser.order("Runtime.enable", json!({}));
        browser
    }

    fn order(&mut self, method: &str, params: Value) -> Value {
        self.number += 1;
        let mut message = json!({"id": self.number, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.orders.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let mut bytes = Vec::new();
            self.answers.read_until(0, &mut bytes).unwrap();
            assert_eq!(bytes.pop(), Some(0), "the browser has ended before it answered {method}");
            let answer: Value = serde_json::from_slice(&bytes).unwrap();
            match answer["method"].as_str() {
                Some("Log.entryAdded") if answer["params"]["entry"]["level"] == "error" => {
                    self.complaints.push(answer["params"]["entry"].to_string());
                }
                Some("Runtime.exceptionThrown") => self.complaints.push(answer["params"].to_string()),
                _ => {}
            }
            if answer["id"] == self.number {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// The window is so large from now on.
    pub fn resize(&mut self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.order("Emulation.setDeviceMetricsOverride", size);
    }

    pub fn open(&mut self, url: &str) {
        self.order("Page.navigate", json!({"url": url}));
    }

    /// The value of an expression of the page's script.
    pub fn value(&mut self, expression: &str) -> Value {
        let result = self.order("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true. The test's own deadline ends that.
    pub fn wait_for(&mut self, expression: &str) {
        while self.value(expression) != json!(true) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The whole page, as PNG.
    pub fn screenshot(&mut self, width: u32, most_height: u32) -> Vec<u8> {
        let height = self.value("Math.ceil(document.documentElement.getBoundingClientRect().height)");
        self.resize(width, most_height.min(height.as_u64().unwrap() as u32));
        let shot = self.order("Page.captureScreenshot", json!({"format": "png"}));
        from_base64(shot["data"].as_str().unwrap())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |c: u8| DIGITS.iter().position(|digit| *digit == c).expect("a digit") as u32;
    let text = text.trim_end_matches('=').as_bytes();
    let group = |digits: &[u8]| {
        let number = digits.iter().fold(0, |number, c| number << 6 | digit(*c)) << (6 * (4 - digits.len()));
        number.to_be_bytes()[1..digits.len()].to_vec()
    };
    text.chunks(4).flat_map(group).collect()
}

#[test]
fn base64_is_read() {
    assert_eq!(from_base64("aGVsbG8="), b"hello");
    assert_eq!(from_base64("aGVsbG8h"), b"hello!");
}
