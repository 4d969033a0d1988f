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

#[test]
fn the_openapi_document_is_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let packages = root.join("target/test-tools/openapi");
    assert!(
        packages.exists(),
        "run ./test once, it installs the validator"
    );

    let output = Command::new(root.join("target/test-tools/python/bin/python"))
        .args(["-m", "openapi_spec_validator", "--schema", "3.1"])
        .arg(root.join("docs/openapi.json"))
        .env("PYTHONPATH", packages)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();

    assert!(output.status.success(), "{output:?}");
}
