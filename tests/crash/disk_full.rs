//! A disk that becomes full.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::broker::Broker;
use crate::client::Client;
use crate::seed::Seed;
use crate::wire::{Answer, Connect, Packet, Publish, Version};

/// A small file system, unmounted when dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path, bytes: &str) -> Result<Self, String> {
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "midge-test"])
            .arg(path)
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(Self(path))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    fn resize(&self, bytes: &str) {
        let options = format!("remount,size={bytes}");
        let resized = Command::new("mount")
            .args(["-o", &options])
            .arg(self.0)
            .status();
        assert!(resized.unwrap().success());
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        // Lazily: a broker of a failed test may have files open.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// I1: what could not be written is not acknowledged, and the broker says so and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_the_broker_and_loses_nothing_acknowledged() {
    let directory = TempDir::new().unwrap();
    let mount_point = directory.path().join("disk");
    fs::create_dir(&mount_point).unwrap();
    let disk = match SmallDisk::mount(&mount_point, "4m") {
        Ok(disk) => disk,
        Err(reason) => {
            eprintln!("SKIPPED: a small disk cannot be mounted here: {reason}");
            return;
        }
    };
    let mut broker = Broker::start_on(&mount_point.join("data"), directory, &[]);
    let subscriber = Connect::persistent(Version::V311, "subscriber");
    let mut client = Client::connect(broker.address(), &subscriber).await;
    client.subscribe("disk", 1).await.unwrap();
    client.disconnect().await.unwrap();

    let publisher = Connect::fleeting(Version::V311, "publisher");
    let mut publisher = Client::connect(broker.address(), &publisher).await;
    let mut seed = Seed::new();
    let mut acknowledged = 0_usize;
    // Twice what fits.
    for number in 0..800_usize {
        // Nothing that can be compressed.
        let noise = String::from_iter((0..2500).map(|_| format!("{:04x}", seed.below(1 << 16))));
        let publish = Publish {
            payload: format!("{number} {noise}").into_bytes(),
            ..Publish::new("disk", "", 1)
        };
        // Both fail when the broker has ended.
        if publisher
            .send(&publish.encode(Version::V311))
            .await
            .is_err()
        {
            break;
        }
        match publisher.receive().await {
            Ok(Packet::Answer(Answer::PubAck, ..)) => acknowledged += 1,
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    let status = broker.wait();

    assert_eq!(status.code(), Some(1));
    let log = broker.log();
    assert!(
        log.iter().any(|line| line.contains("store_failed")),
        "{log:#?}"
    );
    disk.resize("64m");
    broker.start_again();
    assert!(acknowledged > 100, "{acknowledged} fit");
    let mut client = Client::connect(broker.address(), &subscriber).await;
    assert!(client.session_present);
    for number in 0..acknowledged {
        let message = client.message().await.unwrap();
        assert!(message.text().starts_with(&format!("{number} ")));
    }
}
