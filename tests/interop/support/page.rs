use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use serde_json::Value;

use super::{lines::DEADLINE, source_file, test_tool};

/// A web server with one page, which uses MQTT.js and reports what happens to `/report`.
pub(crate) struct PageServer {
    address: SocketAddr,
    reports: mpsc::Receiver<Value>,
}

impl PageServer {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let (report, reports) = mpsc::sync_channel(16);
        thread::spawn(move || {
            // A browser opens connections in advance, so none may wait for another.
            for stream in listener.incoming().flatten() {
                let report = report.clone();
                thread::spawn(move || answer(&stream, &report));
            }
        });
        Self { address, reports }
    }

    /// The page, told which broker to connect to.
    pub(crate) fn url(&self, broker: &str) -> String {
        format!("http://{}/#{broker}", self.address)
    }

    /// Waits for the next thing that the page reports.
    #[track_caller]
    pub(crate) fn next_report(&self) -> Value {
        self.reports
            .recv_timeout(DEADLINE)
            .expect("the page reports something")
    }
}

/// Answers one request; `None` when the browser sent none or went away.
fn answer(mut stream: &TcpStream, report: &mpsc::SyncSender<Value>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request).ok()?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok()?;
        }
    }

    let mut parts = request.split(' ');
    let (status, kind, content) = match (parts.next()?, parts.next()?) {
        ("GET", "/") => (
            "200 OK",
            "text/html",
            fs::read(source_file("browser/page.html")).ok()?,
        ),
        ("GET", "/mqtt.min.js") => {
            let bundle = test_tool("js/node_modules/mqtt/dist/mqtt.min.js");
            ("200 OK", "text/javascript", fs::read(bundle).ok()?)
        }
        ("POST", "/report") => {
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            report.send(serde_json::from_slice(&body).ok()?).ok()?;
            ("200 OK", "text/plain", Vec::new())
        }
        _ => ("404 Not Found", "text/plain", Vec::new()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: {kind}; charset=utf-8\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        content.len()
    )
    .ok()?;
    stream.write_all(&content).ok()
}
