//! The binary as a person or a script meets it.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test panic like the test"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs midge to its end in `folder`, with `stdin`, and with nothing of our own environment that
/// could set something.
#[track_caller]
fn midge(folder: &Path, arguments: &[&str], stdin: &str) -> Output {
    let mut child = command(folder, arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails early does not read it.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in ours.filter(|name| name.to_string_lossy().starts_with("MIDGE_")) {
        command.env_remove(name);
    }
    command
        .current_dir(folder)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[track_caller]
fn expect_success(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn expect_failure(output: &Output, code: i32) -> String {
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(errors.starts_with("error: "), "{errors}");
    errors
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn version_is_shown() {
    let folder = folder();
    let version = format!("midge {}\n", env!("CARGO_PKG_VERSION"));

    assert_eq!(
        expect_success(&midge(folder.path(), &["version"], "")),
        version
    );
    assert_eq!(
        expect_success(&midge(folder.path(), &["--version"], "")),
        version
    );
}

#[test]
fn wrong_use_is_exit_code_2() {
    let folder = folder();
    for arguments in [
        &["brew"][..],
        &["--colour"],
        &["check", "--set", "x"],
        &["user", "add", "ann"],
    ] {
        expect_failure(&midge(folder.path(), arguments, ""), 2);
    }
}

#[test]
fn check_shows_what_is_in_effect() {
    let folder = folder();
    std::fs::write(
        folder.path().join("m.toml"),
        "[limits]\nconnections_max = 7\n",
    )
    .unwrap();

    let shown = expect_success(&midge(folder.path(), &["check", "--config", "m.toml"], ""));

    assert!(
        shown.contains("connections_max = 7  # m.toml:2\n"),
        "{shown}"
    );
    assert!(shown.contains("bind = \"127.0.0.1:1883\"\n"), "{shown}");
}

#[test]
fn check_names_the_line_of_a_mistake() {
    let folder = folder();
    std::fs::write(
        folder.path().join("m.toml"),
        "[limits]\nconection_max = 7\n",
    )
    .unwrap();

    let errors = expect_failure(&midge(folder.path(), &["check", "-c", "m.toml"], ""), 1);

    assert!(
        errors.contains("m.toml:2:1") && errors.contains("`limits.connections_max`"),
        "{errors}"
    );
}

#[test]
fn check_looks_into_the_files_that_are_named() {
    let folder = folder();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.path().join("tls.crt"), made.cert.pem()).unwrap();
    std::fs::write(
        folder.path().join("tls.key"),
        made.signing_key.serialize_pem(),
    )
    .unwrap();
    std::fs::write(
        folder.path().join("other.key"),
        other.signing_key.serialize_pem(),
    )
    .unwrap();
    let check = |settings: &[&str]| {
        let mut arguments = vec!["check"];
        arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        midge(folder.path(), &arguments, "")
    };
    let certificate = "listeners.tls.tls.certificate=tls.crt";

    expect_success(&check(&[certificate, "listeners.tls.tls.key=tls.key"]));
    for (key, reason) in [
        ("other.key", "is not the key of the certificate tls.crt"),
        ("missing.key", "cannot be read"),
        ("tls.crt", "holds no private key"),
    ] {
        let errors = expect_failure(
            &check(&[certificate, &format!("listeners.tls.tls.key={key}")]),
            1,
        );
        assert!(errors.contains(reason) && errors.contains(key), "{errors}");
    }
    let errors = expect_failure(&check(&["auth.users_file=missing.toml"]), 1);
    assert!(
        errors.contains("midge user add --file missing.toml NAME"),
        "{errors}"
    );
}

#[test]
fn the_environment_sets_and_is_blamed() {
    let folder = folder();

    let output = command(folder.path(), &["check"])
        .env("MIDGE_LIMITS__TOPIC_LEVELS_MAX", "9")
        .output()
        .unwrap();
    assert!(
        expect_success(&output)
            .contains("topic_levels_max = 9  # MIDGE_LIMITS__TOPIC_LEVELS_MAX\n")
    );
    let output = command(folder.path(), &["check"])
        .env("MIDGE_LIMITS__TOPIC_LEVEL_MAX", "9")
        .output()
        .unwrap();
    assert!(expect_failure(&output, 1).contains("did you mean MIDGE_LIMITS__TOPIC_LEVELS_MAX?"));
}

#[test]
fn an_open_listener_without_users_refuses_to_start_and_says_both_ways_out() {
    let folder = folder();

    let errors = expect_failure(
        &midge(
            folder.path(),
            &["--set", "listeners.tcp.bind=0.0.0.0:0"],
            "",
        ),
        1,
    );

    for part in [
        "0.0.0.0:0",
        "auth.users_file",
        "midge user add",
        "auth.anonymous = true",
    ] {
        assert!(errors.contains(part), "{part} is not in {errors}");
    }
}

#[test]
fn users_are_added_listed_and_removed() {
    let folder = folder();
    let user = |arguments: &[&str], stdin| {
        let arguments: Vec<&str> = ["user"]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        midge(folder.path(), &arguments, stdin)
    };

    expect_success(&user(&["add", "--file", "users.toml", "ann"], "secret\n"));
    std::fs::write(folder.path().join("password"), "secret\n").unwrap();
    expect_success(&user(
        &[
            "add",
            "--file",
            "users.toml",
            "--password-file",
            "password",
            "bob",
        ],
        "",
    ));
    let listed = expect_success(&user(&["list", "--file", "users.toml"], ""));
    assert_eq!(listed, "ann\targon2\nbob\targon2\n");
    let written = std::fs::read_to_string(folder.path().join("users.toml")).unwrap();
    assert!(
        written.contains("[users.ann]\npassword = \"$argon2id$") && !written.contains("secret"),
        "{written}"
    );

    expect_success(&user(&["remove", "--file", "users.toml", "ann"], ""));
    assert_eq!(
        expect_success(&user(&["list", "--file", "users.toml"], "")),
        "bob\targon2\n"
    );
    expect_failure(&user(&["remove", "--file", "users.toml", "ann"], ""), 1);
    expect_failure(&user(&["add", "--file", "users.toml", "eve"], ""), 1);
}

#[test]
fn logs_are_json_when_nobody_watches_and_never_mixed_with_output() {
    let folder = folder();
    let arguments = [
        "--set",
        "listeners.tcp.bind=127.0.0.1:0",
        "--set",
        "http.bind=127.0.0.1:0",
        "--set",
        "store.kind=memory",
    ];
    let mut child = command(folder.path(), &arguments).spawn().unwrap();

    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    child.kill().unwrap();

    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(
        event["timestamp"].as_str().unwrap().ends_with('Z'),
        "{line}"
    );
    assert!(event["event"].is_string(), "{line}");
    assert!(child.wait_with_output().unwrap().stdout.is_empty());
}
