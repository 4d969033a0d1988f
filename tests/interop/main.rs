//! Real client programs against the real broker: what people have installed must simply work.
//!
//! Every test starts its own broker on a free port with its own directory, runs client programs
//! (`mosquitto_pub`, Node, Python, a browser) and checks what they print. `./test` installs them.
//! Start reading in `support`.

#![expect(
    clippy::unwrap_used,
    reason = "functions that several tests share are tests as well"
)]

mod browser;
mod midge_clients;
mod mosquitto_clients;
mod mqtt_js;
mod paho;
mod support;
mod tutorials;
