//! What README.md and docs/ tell people to do has to work, and where they point has to exist.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test panic like the test"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use midge::Broker;
use midge::config::{Auth, Config, Sources};
use serde_json::Value;

/// A fenced code block, with the language that stands behind the fence.
struct Block {
    language: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md and everything in docs/.
fn documents() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap();
    let mut documents: Vec<_> = docs.map(|entry| entry.unwrap().path()).collect();
    documents.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    documents.push(root().join("README.md"));
    documents
}

/// The text outside of code blocks, and the blocks.
fn split(markdown: &str) -> (String, Vec<Block>) {
    let mut prose = String::new();
    let mut blocks: Vec<Block> = Vec::new();
    let mut is_open = false;
    for line in markdown.lines() {
        match line.strip_prefix("```") {
            Some(language) if !is_open => blocks.push(Block {
                language: language.to_owned(),
                text: String::new(),
            }),
            Some(_) => {}
            None => {
                let text = match blocks.last_mut() {
                    Some(block) if is_open => &mut block.text,
                    _ => &mut prose,
                };
                text.push_str(line);
                text.push('\n');
            }
        }
        is_open ^= line.starts_with("```");
    }
    (prose, blocks)
}

/// What stands below a heading, up to the next one of its level.
#[track_caller]
fn section<'a>(markdown: &'a str, heading: &str) -> &'a str {
    let start = markdown
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("there is no {heading:?}"));
    let below = &markdown[start + 1 + heading.len()..];
    below.find("\n## ").map_or(below, |end| &below[..end])
}

/// Runs each block of commands in turn; a block of text is what the one before it prints. The broker
/// has a free port here instead of 1883, and everything that a person installs is there already.
#[test]
fn the_first_60_seconds_go_as_the_readme_says() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let data = folder.path().join("midge-data");
    let config = Config::load(&Sources {
        set: vec![
            ("listeners.tcp.bind".to_owned(), "127.0.0.1:0".to_owned()),
            ("store.path".to_owned(), data.to_str().unwrap().to_owned()),
        ],
        ..Sources::default()
    });
    let start = Broker::with_config(config.unwrap()).start();
    let broker = runtime.block_on(start).unwrap();
    let port = broker.local_addr("tcp").unwrap().port();
    let mqtt_js = root().join("target/test-tools/js/mqtt-5");
    assert!(mqtt_js.exists(), "run ./test once, it installs MQTT.js");
    let midge = env!("CARGO_BIN_EXE_midge");
    let here = [
        ("mosquitto_pub ", format!("mosquitto_pub -p {port} ")),
        ("mosquitto_sub ", format!("mosquitto_sub -p {port} ")),
        (
            "./target/release/midge pub ",
            format!("{midge} pub -p {port} "),
        ),
        (
            "./target/release/midge sub ",
            format!("{midge} sub -p {port} "),
        ),
        ("127.0.0.1:1883", format!("127.0.0.1:{port}")),
        ("npm install mqtt\n", String::new()),
    ];
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, blocks) = split(section(&readme, "## Try it in 60 seconds"));

    let mut printed = String::new();
    for block in &blocks {
        match block.language.as_str() {
            "sh" => {
                let mut commands = block.text.clone();
                for (there, here) in &here {
                    commands = commands.replace(there, here);
                }
                let output = Command::new("bash")
                    .args(["-euo", "pipefail", "-c", &commands])
                    .current_dir(folder.path())
                    .env("NODE_PATH", &mqtt_js)
                    .output()
                    .unwrap();
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{}{errors}", block.text);
                printed = String::from_utf8(output.stdout).unwrap();
            }
            "text" => assert_eq!(printed, block.text),
            other => panic!("a block of {other:?} is nothing to try"),
        }
    }
    assert_eq!(blocks.len(), 8, "each block of commands has its output");

    runtime.block_on(broker.shutdown());
}

/// Asks for help behind each command of midge in the documents: unless the command is right, that
/// fails.
#[test]
fn every_midge_command_shown_exists() {
    let folder = tempfile::tempdir().unwrap();
    let mut commands = 0;
    for document in documents() {
        let (_, blocks) = split(&fs::read_to_string(&document).unwrap());
        for block in blocks.iter().filter(|block| block.language == "sh") {
            let text = block.text.replace("\\\n", " ");
            for line in text.lines() {
                let Some((_, arguments)) = line
                    .split_once(' ')
                    .filter(|(program, _)| program.rsplit('/').next() == Some("midge"))
                else {
                    continue;
                };
                commands += 1;
                // Bash knows what is quoted and what is a comment.
                let script = format!("set -- {arguments}\n\"$MIDGE\" \"$@\" --help >/dev/null");
                let output = Command::new("bash")
                    .args(["-euo", "pipefail", "-c", &script])
                    .env("MIDGE", env!("CARGO_BIN_EXE_midge"))
                    .current_dir(folder.path())
                    .output()
                    .unwrap();
                let errors = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{line}\n{errors}");
            }
        }
    }
    assert!(commands > 20, "only {commands} commands were found");
}

/// A program that is killed when its test ends, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the commands as they stand, on the files that the text shows; only ports are free ones.
#[test]
fn the_broker_is_opened_to_the_network_as_the_readme_says() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("target/release/midge");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_midge"), &program).unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(folder.path().join("tls.crt"), made.cert.pem()).unwrap();
    fs::write(
        folder.path().join("tls.key"),
        made.signing_key.serialize_pem(),
    )
    .unwrap();
    let bash = |commands: &str| {
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", commands])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        for variable in ["LISTENERS__TLS", "LISTENERS__WSS", "LISTENERS__TCP", "HTTP"] {
            command.env(format!("MIDGE_{variable}__BIND"), "127.0.0.1:0");
        }
        command
    };
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, blocks) = split(section(&readme, "## Open it to the network"));
    let languages: Vec<_> = blocks.iter().map(|block| block.language.as_str()).collect();
    assert_eq!(languages, ["sh", "toml", "sh"]);

    // The password comes from stdin, where there is no terminal to ask at.
    let mut adding = bash(&blocks[0].text).spawn().unwrap();
    let mut password = adding.stdin.take().unwrap();
    password.write_all(b"a password\n").unwrap();
    drop(password);
    assert!(adding.wait().unwrap().success());
    fs::write(folder.path().join("midge.toml"), &blocks[1].text).unwrap();
    let (check, serve) = blocks[2].text.split_once('\n').unwrap();
    let checked = bash(check).stdout(Stdio::null()).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let serve = format!("exec {serve}");
    let mut broker = Running(bash(&serve).spawn().unwrap());
    let log = BufReader::new(broker.0.stderr.take().unwrap());
    let events = log.lines().map(|line| {
        let line = line.unwrap();
        serde_json::from_str::<Value>(&line).unwrap_or_else(|_| panic!("{line}"))
    });
    let events: Vec<_> = events
        .take_while(|event| event["event"] != "ready")
        .collect();
    let tls = events.iter().find(|event| event["listener"] == "tls");
    let address: SocketAddr = tls.unwrap()["address"].as_str().unwrap().parse().unwrap();
    let publish = |password: &str| {
        let port = address.port().to_string();
        let arguments = ["pub", "-h", "localhost", "-p", &port, "--cafile", "tls.crt"];
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .args(["-u", "ann", "-P", password, "-t", "a", "-m", "b", "-q", "1"])
            .current_dir(folder.path());
        command.output().unwrap()
    };

    let accepted = publish("a password");
    let refused = publish("another one");

    assert!(accepted.status.success(), "{accepted:?}");
    assert!(!refused.status.success(), "{refused:?}");
}

#[test]
fn every_relative_link_leads_somewhere() {
    for document in documents() {
        let (prose, _) = split(&fs::read_to_string(&document).unwrap());
        for link in links(&prose) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                document.clone()
            } else {
                document.parent().unwrap().join(path)
            };
            assert!(target.exists(), "{link} in {}", document.display());
            if !anchor.is_empty() {
                let (text, _) = split(&fs::read_to_string(&target).unwrap());
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.any(|heading| anchor_of(heading) == anchor),
                    "{link} in {}",
                    document.display()
                );
            }
        }
    }
}

/// The targets of `[text](target)`.
fn links(prose: &str) -> impl Iterator<Item = &str> {
    let after = prose.split("](").skip(1);
    after.filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

/// As GitHub makes them.
fn anchor_of(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter_map(|letter| match letter {
        ' ' => Some('-'),
        letter if letter.is_alphanumeric() || "-_".contains(letter) => Some(letter),
        _ => None,
    });
    kept.collect()
}

/// A block says in its first line which file it is.
#[test]
fn every_configuration_and_users_file_shown_is_valid() {
    let folder = tempfile::tempdir().unwrap();
    let (mut configurations, mut users_files) = (0, 0);
    for document in documents() {
        let (_, blocks) = split(&fs::read_to_string(&document).unwrap());
        for block in blocks.iter().filter(|block| block.language == "toml") {
            let path = folder.path().join("file.toml");
            fs::write(&path, &block.text).unwrap();
            match block.text.lines().next().unwrap() {
                "# midge.toml" => {
                    configurations += 1;
                    let loaded = Config::load(&Sources {
                        file: Some(path),
                        ..Sources::default()
                    });
                    loaded.unwrap_or_else(|error| panic!("{}: {error}", document.display()));
                }
                "# users.toml" => {
                    users_files += 1;
                    let auth = Auth {
                        users_file: Some(path),
                        ..Auth::default()
                    };
                    midge::auth::from_config(&auth)
                        .unwrap_or_else(|error| panic!("{}: {error}", document.display()));
                }
                _ => {}
            }
        }
    }
    assert!(configurations > 0 && users_files > 0);
}
