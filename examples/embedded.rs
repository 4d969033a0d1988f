//! A broker inside a program that watches a topic and answers it.
//!
//! `cargo run --example embedded`, then in another terminal:
//! `mosquitto_sub -t 'echo/#' -v` and `mosquitto_pub -t hello -m world`.

use midge::Broker;
use midge::embed::Publish;
use midge::mqtt::QoS;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = Broker::builder().in_memory().start().await?;
    let mut subscription = broker.subscribe("#", QoS::AtLeastOnce)?;
    eprintln!(
        "listening on {:?}; Ctrl-C ends it",
        broker.local_addr("tcp")
    );
    loop {
        tokio::select! {
            message = subscription.next() => {
                // What was answered comes back as well; it is not answered again.
                if !message.topic().starts_with("echo/") {
                    let topic = format!("echo/{}", message.topic());
                    let echo = Publish::new(&topic, message.payload()).qos(message.qos());
                    broker.publish(if message.retain() { echo.retain() } else { echo }).await?;
                }
            }
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    broker.shutdown().await;
    Ok(())
}
