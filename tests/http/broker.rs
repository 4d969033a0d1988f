//! A midge with its HTTP server, and requests to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::lines::{DEADLINE, Lines};

/// A running midge; killed when dropped.
pub(crate) struct Broker {
    process: Child,
    log: Lines,
    pub(crate) mqtt: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) folder: TempDir,
}

/// What a request was answered with.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Broker {
    #[track_caller]
    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[])
    }

    #[track_caller]
    pub(crate) fn start_in(folder: TempDir, settings: &[&str]) -> Self {
        let (process, log) = spawn(&folder, settings);
        Self::started(folder, process, log)
    }

    /// With a configuration file.
    #[track_caller]
    pub(crate) fn start_from(folder: TempDir, config: &str, settings: &[&str]) -> Self {
        let mut command = serve(&folder, settings);
        let (process, log) = watch(command.args(["--config", config]));
        Self::started(folder, process, log)
    }

    #[track_caller]
    fn started(folder: TempDir, process: Child, log: Lines) -> Self {
        log.wait_for("the event `ready`", |lines| event(lines, "ready"));
        let lines = log.so_far();
        let mut http = address(&event(&lines, "http_started").unwrap());
        http.set_ip([127, 0, 0, 1].into());
        let broker = Self {
            process,
            mqtt: address(&event(&lines, "listener_started").unwrap()),
            http,
            log,
            folder,
        };
        while broker.get("/readyz").status != 200 {
            std::thread::yield_now();
        }
        broker
    }

    #[track_caller]
    pub(crate) fn wait_for_event(&self, name: &str) -> Value {
        let what = format!("the event `{name}`");
        self.log.wait_for(&what, |lines| event(lines, name))
    }

    pub(crate) fn log(&self) -> String {
        self.log.so_far().join("\n")
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
    }

    /// Waits for it to end by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", "")
    }

    #[track_caller]
    pub(crate) fn post(&self, path: &str) -> Answer {
        self.ask("POST", path, "", "")
    }

    #[track_caller]
    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.ask("DELETE", path, "", "")
    }

    #[track_caller]
    pub(crate) fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        let headers = "Content-Type: application/json\r\n";
        self.ask(method, path, headers, &body.to_string())
    }

    /// `headers` are whole lines.
    #[track_caller]
    pub(crate) fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let host = self.http;
        let length = body.len();
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\
             Content-Length: {length}\r\n{headers}\r\n{body}"
        ))
    }

    #[track_caller]
    pub(crate) fn raw(&self, request: &str) -> Answer {
        let mut stream = self.open();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        Answer {
            status: head[9..12].parse().unwrap(),
            head: head.to_lowercase(),
            body: body.to_owned(),
        }
    }

    /// `None` if the connection was refused.
    pub(crate) fn open_and_ask_livez(&self) -> Option<()> {
        let mut stream = self.open();
        let request = "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200").then_some(())
    }

    pub(crate) fn open(&self) -> TcpStream {
        let stream = TcpStream::connect(self.http).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("── the broker's log ──\n{}", self.log());
        }
    }
}

impl Answer {
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it is an error as RFC 9457 describes them; returns it.
    #[track_caller]
    pub(crate) fn expect_problem(self, status: u16, code: &str) -> Value {
        assert!(
            self.head.contains("content-type: application/problem+json"),
            "{self:?}"
        );
        let problem = self.expect(status).json();
        assert_eq!(problem["status"], status, "{problem}");
        assert_eq!(problem["code"], code, "{problem}");
        assert!(problem["title"].is_string() && problem["detail"].is_string());
        problem
    }
}

pub(crate) fn spawn(folder: &TempDir, settings: &[&str]) -> (Child, Lines) {
    watch(&mut serve(folder, settings))
}

fn serve(folder: &TempDir, settings: &[&str]) -> Command {
    let mut command = midge(folder);
    command.arg("serve");
    let fixed = [
        "listeners.tcp.bind=127.0.0.1:0",
        "http.bind=127.0.0.1:0",
        "store.kind=memory",
        "node.name=here",
        "log.format=json",
    ];
    for setting in fixed.iter().chain(settings) {
        command.args(["--set", setting]);
    }
    command
}

/// Starts it, and reads its log.
fn watch(command: &mut Command) -> (Child, Lines) {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let log = Lines::collect(child.stderr.take().unwrap());
    (child, log)
}

/// The program, with nothing of our own environment that could set something.
pub(crate) fn midge(folder: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in ours.filter(|name| name.to_string_lossy().starts_with("MIDGE_")) {
        command.env_remove(name);
    }
    command.current_dir(folder.path()).stdin(Stdio::null());
    command
}

fn address(started: &Value) -> SocketAddr {
    started["address"].as_str().unwrap().parse().unwrap()
}

fn event(lines: &[String], name: &str) -> Option<Value> {
    lines
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|record| record["event"] == name)
}
