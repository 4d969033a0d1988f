use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::broker::Broker;

fn in_docs() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_broker_serves_its_openapi_document() {
    let broker = Broker::start();

    let served = broker.get("/api/v1/openapi.json").expect(200).json();

    assert_eq!(served["openapi"], "3.1.0");
    assert_eq!(served, in_docs());
}

/// Python with a package that `./test` installs.
fn python(package: &str) -> Command {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools");
    let packages = tools.join(package);
    assert!(packages.exists(), "run ./test once, it installs {package}");
    let mut command = Command::new(tools.join("python/bin/python"));
    command
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

#[test]
fn the_openapi_document_is_valid() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");

    let output = python("openapi")
        .args(["-m", "openapi_spec_validator", "--schema", "3.1"])
        .arg(document)
        .output()
        .unwrap();

    assert!(output.status.success(), "{output:?}");
}

/// Requests that the document allows, and some that it does not, get answers that it describes.
/// `MIDGE_TEST_SEED` repeats a run; a failure names its seed.
#[test]
fn the_api_does_what_its_document_says() {
    let broker = Broker::start();
    let url = format!("http://{}/api/v1", broker.http);
    let run = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())";
    let mut command = python("schemathesis");
    command
        .args(["-c", run, "run", &format!("{url}/openapi.json")])
        .args(["--url", &url, "--checks", "all"])
        // What a topic or a cursor is, no schema can say.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .args(["--max-examples", "30", "--no-color"])
        .current_dir(broker.folder.path());
    if let Ok(seed) = std::env::var("MIDGE_TEST_SEED") {
        command.args(["--seed", &seed]);
    }

    let output = command.output().unwrap();

    let (out, errors) = (&output.stdout, &output.stderr);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(errors)
    );
    broker.get("/readyz/store").expect(200);
}
