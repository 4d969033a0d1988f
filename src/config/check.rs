//! What one setting alone cannot say: whether it goes with the others, and is within bounds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::draft::{Draft, LISTENERS};
use super::problem::Problem;
use super::{Bus, BusKind, ByteSize, Listener, Store, StoreKind};
use crate::mqtt::topic::validate_topic_name;

impl Draft {
    pub(super) fn check(
        &self,
        listeners: &BTreeMap<String, Listener>,
        problems: &mut Vec<Problem>,
    ) {
        self.check_addresses(listeners, problems);
        self.check_access(listeners, problems);
        self.check_store(problems);
        self.check_bus(problems);
        self.check_ranges(problems);
    }

    fn check_addresses(&self, listeners: &BTreeMap<String, Listener>, problems: &mut Vec<Problem>) {
        let mut taken: BTreeMap<SocketAddr, &str> = BTreeMap::new();
        for (name, listener) in listeners {
            // Any number may ask the system for a free port.
            if listener.bind.port() == 0 {
                continue;
            }
            if let Some(other) = taken.insert(listener.bind, name) {
                let origin = self.origin_of_any(&format!("{LISTENERS}.{name}.bind"));
                let what = format!(
                    "listeners `{other}` and `{name}` both want {}",
                    listener.bind
                );
                problems.push(Problem::new(origin, what));
            }
        }
        if let (true, Some(name)) = (self.http.enabled, taken.get(&self.http.bind)) {
            let what = format!(
                "http and the listener `{name}` both want {}",
                self.http.bind
            );
            problems.push(Problem::new(self.origin("http.bind"), what));
        }
    }

    /// Nobody opens the broker to the world by leaving something out.
    fn check_access(&self, listeners: &BTreeMap<String, Listener>, problems: &mut Vec<Problem>) {
        let undecided = self.auth.is_undecided();
        for (name, listener) in listeners {
            if undecided && listener.is_exposed() {
                let origin = self.origin_of_any(&format!("{LISTENERS}.{name}.bind"));
                let what = format!(
                    "listener `{name}` can be reached from other machines ({}), and nothing says who may connect",
                    listener.bind
                );
                problems.push(Problem::new(origin, what).with_hint(
                    "either set auth.users_file to a file made with `midge user add --file users.toml NAME`, \
                     or let everybody in with auth.anonymous = true",
                ));
            }
        }
        let certificates = listeners.values().any(|listener| {
            listener
                .tls
                .as_ref()
                .is_some_and(|tls| tls.client_auth != super::ClientAuth::None)
        });
        if self.auth.anonymous == Some(false) && self.auth.users_file.is_none() && !certificates {
            let what =
                "auth.anonymous = false, but there is no auth.users_file: nobody could connect";
            problems.push(
                Problem::new(self.origin("auth.anonymous"), what)
                    .with_hint("make one with `midge user add --file users.toml NAME`"),
            );
        }
    }

    fn check_store(&self, problems: &mut Vec<Problem>) {
        let Store {
            kind,
            uri,
            uri_file,
            write_elision,
            ..
        } = &self.store;
        let mut report = |key: &str, what: &str, hint: &str| {
            problems.push(Problem::new(self.origin(key), what).with_hint(hint));
        };
        let given = [
            ("store.uri", uri.is_some()),
            ("store.uri_file", uri_file.is_some()),
        ];
        let mut given = given
            .into_iter()
            .filter_map(|(key, is_given)| is_given.then_some(key));
        match (kind, given.next(), given.next()) {
            (StoreKind::MongoDb, None, _) => report(
                "store.kind",
                "store.kind = \"mongodb\", but nothing says where MongoDB is",
                "set store.uri, such as \"mongodb://db1,db2,db3/?replicaSet=rs0\", \
                 or store.uri_file to a file that holds it",
            ),
            (StoreKind::MongoDb, Some(_), Some(_)) => report(
                "store.uri_file",
                "store.uri and store.uri_file are both set",
                "take one of them out",
            ),
            (StoreKind::Embedded | StoreKind::Memory, Some(key), _) => report(
                key,
                &format!(
                    "{key} has no effect with store.kind = \"{}\"",
                    kind.as_str()
                ),
                "set store.kind = \"mongodb\", or take it out",
            ),
            (StoreKind::MongoDb, Some(_), None)
            | (StoreKind::Embedded | StoreKind::Memory, None, _) => {}
        }
        if !*write_elision && *kind != StoreKind::MongoDb {
            report(
                "store.write_elision",
                &format!(
                    "store.write_elision has no effect with store.kind = \"{}\"",
                    kind.as_str()
                ),
                "set store.kind = \"mongodb\", or take it out",
            );
        }
    }

    fn check_bus(&self, problems: &mut Vec<Problem>) {
        let Bus {
            kind,
            url,
            url_file,
        } = &self.bus;
        let mut report = |key: &str, what: &str, hint: &str| {
            problems.push(Problem::new(self.origin(key), what).with_hint(hint));
        };
        let is_shared = self.store.kind == StoreKind::MongoDb;
        match kind {
            Some(BusKind::Redis | BusKind::MongoDb) if !is_shared => {
                return report(
                    "bus.kind",
                    &format!(
                        "store.kind = \"{}\" is for one node alone, and a bus is between several",
                        self.store.kind.as_str()
                    ),
                    "set store.kind = \"mongodb\", or take bus.kind out",
                );
            }
            Some(BusKind::None) if is_shared => {
                return report(
                    "bus.kind",
                    "store.kind = \"mongodb\" is for several nodes, and they need a bus",
                    "set bus.kind = \"redis\" or \"mongodb\", or take it out",
                );
            }
            Some(_) | None => {}
        }
        let is_redis = *kind == Some(BusKind::Redis);
        match (is_redis, url, url_file) {
            (true, None, None) => report(
                "bus.kind",
                "bus.kind = \"redis\", but nothing says where Redis is",
                "set bus.url, such as \"redis://cache:6379\", or bus.url_file to a file that \
                 holds it",
            ),
            (true, Some(_), Some(_)) => report(
                "bus.url_file",
                "bus.url and bus.url_file are both set",
                "take one of them out",
            ),
            (false, Some(_), _) => report(
                "bus.url",
                "bus.url has no effect without bus.kind = \"redis\"",
                "set bus.kind = \"redis\", or take it out",
            ),
            (false, None, Some(_)) => report(
                "bus.url_file",
                "bus.url_file has no effect without bus.kind = \"redis\"",
                "set bus.kind = \"redis\", or take it out",
            ),
            (true, Some(_), None) | (true, None, Some(_)) | (false, None, None) => {}
        }
    }

    fn check_ranges(&self, problems: &mut Vec<Problem>) {
        let Self {
            limits,
            session,
            log,
            node,
            store,
            ..
        } = self;
        let mut check = |key: &str, fits: bool, should: &str| {
            if !fits {
                problems.push(Problem::new(
                    self.origin(key),
                    format!("{key} should be {should}"),
                ));
            }
        };
        let within = |size: ByteSize, range: RangeInclusive<usize>| range.contains(&size.get());
        let seconds = |duration: Option<Duration>, range: RangeInclusive<u64>| {
            duration.is_none_or(|duration| range.contains(&duration.as_secs()))
        };

        let name_fits = node.name.len() <= 255
            && !node
                .name
                .contains(|c: char| c.is_control() || "/+#".contains(c));
        check(
            "node.name",
            name_fits,
            "at most 255 bytes, without `/`, `+` and `#`",
        );
        let zone_fits = |zone: &String| zone.len() <= 255 && !zone.contains(char::is_control);
        check(
            "node.zone",
            node.zone.iter().all(zone_fits),
            "at most 255 bytes",
        );
        let database_fits = store.database.len() <= 63
            && !store
                .database
                .contains(|c: char| c.is_control() || "/\\. \"$".contains(c))
            && !["admin", "config", "local"].contains(&store.database.as_str());
        check(
            "store.database",
            database_fits,
            "at most 63 bytes, without space, `/`, `\\`, `.`, `\"` and `$`, and none of MongoDB's own",
        );
        let prefix = session.response_prefix.as_deref();
        check(
            "session.response_prefix",
            prefix.is_none_or(|prefix| validate_topic_name(prefix).is_ok()),
            "the beginning of a topic name, without wildcards",
        );
        check(
            "limits.connect_timeout",
            !limits.connect_timeout.is_zero(),
            "longer than nothing",
        );
        // The largest Remaining Length, section 2.1.4; below 128 not even a CONNECT fits.
        let packet_fits = within(limits.packet_bytes_max, 128..=268_435_455);
        check(
            "limits.packet_bytes_max",
            packet_fits,
            "from 128 to 268435455 bytes",
        );
        // A document of MongoDB has 16 MiB, and holds a message with what belongs to it.
        let document_fits = within(limits.packet_bytes_max, 0..=15 * 1024 * 1024);
        check(
            "limits.packet_bytes_max",
            self.store.kind != StoreKind::MongoDb || document_fits,
            "at most 15 MiB with store.kind = \"mongodb\"",
        );
        // [MQTT-3.1.3-5] asks for 23.
        let client_id_fits = within(limits.client_id_bytes_max, 23..=65_535);
        check(
            "limits.client_id_bytes_max",
            client_id_fits,
            "from 23 to 65535 bytes",
        );
        check(
            "limits.topic_bytes_max",
            within(limits.topic_bytes_max, 1..=65_535),
            "from 1 to 65535 bytes",
        );
        let levels_fit = limits.topic_levels_max <= 65_536;
        check(
            "limits.topic_levels_max",
            levels_fit,
            "at most 65536, which is one more than a topic has bytes",
        );
        let keep_alive_fits = seconds(limits.keep_alive_max, 1..=65_535);
        check(
            "limits.keep_alive_max",
            keep_alive_fits,
            "from 1s to 65535s, or \"unlimited\"",
        );
        let expiry_fits = seconds(session.expiry_max, 0..=u64::from(u32::MAX) - 1);
        check(
            "session.expiry_max",
            expiry_fits,
            "at most 4294967294s, or \"unlimited\"",
        );
        check(
            "log.level",
            crate::telemetry::is_filter(&log.level),
            "a level such as \"info\", or levels for parts such as \"info,midge::net=debug\"",
        );
    }
}
