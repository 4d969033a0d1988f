//! Brings the sources together: their assignments are carried out in the order of their weight. So
//! every error knows whom to blame, and every value where it is from.

use std::collections::BTreeMap;

use aws_lc_rs::digest;

use super::draft::Draft;
use super::problem::Problem;
use super::sources::Sources;
use super::{Config, ConfigError};

/// Enough to tell the settings of nodes apart; nobody tries to make two alike.
const FINGERPRINT_BYTES: usize = 4;

/// A [`Config`] that remembers where its values come from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    sources: Sources,
    draft: Draft,
}

impl Loaded {
    /// # Errors
    /// Every problem that was found, not just the first.
    pub fn new(sources: &Sources) -> Result<Self, ConfigError> {
        let mut draft = Draft::default();
        let assignments = sources
            .read()
            .map_err(|problem| ConfigError(vec![problem]))?;
        let mut problems: Vec<Problem> = assignments
            .into_iter()
            .filter_map(|assignment| draft.assign(assignment).err())
            .collect();
        // What a wrong value leads to would only be noise.
        if problems.is_empty() {
            match draft.complete(&mut problems) {
                Some(config) if problems.is_empty() => {
                    let sources = sources.clone();
                    return Ok(Self {
                        config,
                        sources,
                        draft,
                    });
                }
                _ => {}
            }
        }
        Err(ConfigError(problems))
    }

    /// All that is in effect, as a file that would set the same, passwords apart; what is not a
    /// default says where it comes from.
    pub fn to_toml(&self) -> String {
        self.draft.to_toml()
    }

    /// A few digits that nodes with the same settings have in common: of a hash of all that is in effect
    /// but passwords, the name and zone of the node, and its addresses.
    pub(crate) fn fingerprint(values: &BTreeMap<String, String>) -> String {
        let is_own = |key: &str| {
            key == "node.name"
                || key == "node.zone"
                || key == "http.bind"
                || (key.starts_with("listeners.") && key.ends_with(".bind"))
        };
        let mut hash = digest::Context::new(&digest::SHA256);
        for (key, value) in values.iter().filter(|(key, _)| !is_own(key)) {
            hash.update(format!("{key} = {value}\n").as_bytes());
        }
        let hash = hash.finish();
        let digits = hash.as_ref().iter().take(FINGERPRINT_BYTES);
        digits.map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Every setting by its dotted key, as it would be written in a file; not those without a
    /// value.
    pub(crate) fn values(&self) -> BTreeMap<String, String> {
        self.draft.values()
    }

    /// Reports a file that a setting names and that is of no use.
    pub(crate) fn blame(&self, key: &str, what: impl Into<String>) -> Problem {
        Problem::new(self.draft.origin(key), what)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::draft::LISTENERS;
    use super::super::listener::{ListenerDraft, TlsDraft};
    use super::super::sources::{PREFIX, SEPARATOR};
    use super::super::value::Section;
    use super::super::{Bus, ClientAuth, QueueFull, StoreKind, Transport};
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("midge.toml");
        std::fs::write(&path, text).unwrap();
        (
            folder,
            Sources {
                file: Some(path),
                ..Sources::default()
            },
        )
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn from_file(text: &str) -> Result<Config, ConfigError> {
        let (_folder, sources) = file(text);
        Config::load(&sources)
    }

    fn from_environment(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::load(&Sources {
            environment: pairs(variables),
            ..Sources::default()
        })
    }

    fn from_set(arguments: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::load(&Sources {
            set: pairs(arguments),
            ..Sources::default()
        })
    }

    #[track_caller]
    fn assert_error(result: Result<Config, ConfigError>, parts: &[&str]) {
        let error = result.unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    fn example() -> String {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/midge.toml"))
            .unwrap()
    }

    #[test]
    fn the_example_sets_every_key_to_its_default() {
        assert_eq!(from_file(&example()).unwrap(), Config::default());
    }

    #[test]
    fn the_example_has_every_key_and_no_other() {
        let example = example();
        for (section, keys) in Draft::default()
            .sections()
            .map(|(name, section)| (name, section.keys()))
        {
            assert!(example.contains(&format!("[{section}]")), "{section}");
            for key in keys {
                assert!(example.contains(&format!("{key} = ")), "{section}.{key}");
            }
        }
        // What is commented out must be right as well, of the URIs the first one.
        let all: String = example
            .replace("kind = \"embedded\"", "kind = \"mongodb\"")
            .lines()
            .filter(|line| !line.starts_with("# uri_file") && !line.starts_with("# url_file"))
            .map(|line| {
                line.strip_prefix("# ")
                    .filter(|line| line.starts_with('[') || line.contains(" = "))
                    .unwrap_or(line)
            })
            .filter(|line| !line.contains("MIDGE_"))
            .flat_map(|line| [line, "\n"])
            .collect();
        let config = from_file(&all).unwrap();
        assert_eq!(
            config.listeners.keys().collect::<Vec<_>>(),
            ["tcp", "tls", "ws"]
        );
    }

    /// The rows of the tables in docs/configuration.md: key, default, variable.
    fn documented() -> Vec<[String; 3]> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        let text = std::fs::read_to_string(path).unwrap();
        let cells = |line: &str| -> Vec<String> {
            let inner = line.trim_start_matches("| ").trim_end_matches(" |");
            inner.split(" | ").map(str::to_owned).collect()
        };
        let rows = text.lines().filter(|line| line.contains("| `MIDGE_"));
        rows.map(|line| {
            let cells = cells(line);
            assert_eq!(cells.len(), 4, "{line}");
            [0, 1, 2].map(|at| cells[at].trim_matches('`').to_owned())
        })
        .collect()
    }

    #[test]
    fn the_documentation_has_every_key_and_no_other_with_its_default() {
        let documented = documented();
        let draft = Draft::default();
        let defaults = draft.sections().into_iter().flat_map(|(name, section)| {
            let shown = section.show().into_iter();
            shown.map(move |(key, value)| (format!("{name}.{key}"), value))
        });
        let mut expected: Vec<[String; 3]> = defaults
            .map(|(key, value)| {
                let variable = format!("{PREFIX}{}", key.replace('.', SEPARATOR).to_uppercase());
                let value = match key.as_str() {
                    "node.name" => "the name of the host".to_owned(),
                    _ => value.unwrap_or_else(|| "unset".to_owned()),
                };
                [key, value, variable]
            })
            .collect();

        let (listeners, mut others): (Vec<_>, Vec<_>) = documented
            .into_iter()
            .partition(|[key, ..]| key.starts_with(LISTENERS));
        expected.sort();
        others.sort();
        assert_eq!(others, expected);
        let keys: Vec<_> = listeners.iter().map(|[key, ..]| key.as_str()).collect();
        let tls = TlsDraft::default().keys().iter();
        let expected: Vec<_> = ListenerDraft::default()
            .keys()
            .iter()
            .map(|key| format!("listeners.NAME.{key}"))
            .chain(tls.map(|key| format!("listeners.NAME.tls.{key}")))
            .collect();
        assert_eq!(keys, expected);
    }

    /// What depends on the kind has no default of its own that could be compared.
    #[test]
    fn the_documented_defaults_of_listeners_are_those_in_effect() {
        let documented = documented();
        let loaded = Loaded::new(&Sources {
            set: pairs(&[
                ("listeners.wss.tls.certificate", "c"),
                ("listeners.wss.tls.key", "k"),
            ]),
            ..Sources::default()
        })
        .unwrap();
        let shown = loaded.to_toml();
        for key in ["path", "allowed_origins"] {
            let wanted = format!("listeners.NAME.{key}");
            let [_, default, _] = documented.iter().find(|[key, ..]| *key == wanted).unwrap();
            assert!(shown.contains(&format!("{key} = {default}\n")), "{shown}");
        }
    }

    #[test]
    fn without_any_source_only_this_machine_can_connect() {
        let config = Config::default();

        assert_eq!(config.listeners.len(), 1);
        assert_eq!(config.listeners["tcp"].bind, ([127, 0, 0, 1], 1883).into());
        assert!(config.auth.allows_anonymous());
    }

    #[test]
    fn the_command_line_outweighs_the_environment_and_that_the_file() {
        let (_folder, mut sources) = file(
            "[limits]\ntopic_alias_maximum = 1\nconnections_max = 1\n[session]\nqueue_full = \"disconnect\"\n",
        );
        sources.environment = pairs(&[
            ("MIDGE_LIMITS__TOPIC_ALIAS_MAXIMUM", "2"),
            ("MIDGE_LIMITS__CONNECTIONS_MAX", "2"),
        ]);
        sources.set = pairs(&[("limits.topic_alias_maximum", "3")]);

        let config = Config::load(&sources).unwrap();

        assert_eq!(config.session.queue_full, QueueFull::Disconnect);
        assert_eq!(config.limits.connections_max, Some(2));
        assert_eq!(config.limits.topic_alias_maximum, 3);
    }

    #[test]
    fn an_unknown_key_is_shown_where_it_is_with_the_nearest_one() {
        assert_error(
            from_file("[limits]\npacket_byte_max = 1\n"),
            &[
                "limits.packet_byte_max",
                "midge.toml:2:1",
                "did you mean `limits.packet_bytes_max`?",
            ],
        );
        assert_error(
            from_file("max_connections = 1\n"),
            &["did you mean `limits.connections_max`?"],
        );
        assert_error(
            from_file("[limit]\nconnections_max = 1\n"),
            &["did you mean `limits.connections_max`?"],
        );
        assert_error(
            from_file("[listeners.ws]\nbnd = 1\n"),
            &["did you mean `listeners.ws.bind`?"],
        );
        assert_error(
            from_set(&[("listeners.ws.port", "1")]),
            &["did you mean `listeners.ws.bind`?"],
        );
        assert_error(
            from_file("[listeners.x.tls]\ncert = \"c\"\n"),
            &["no such setting: listeners.x.tls.cert"],
        );
        assert_error(from_file("limits = 1\n"), &["limits is a table"]);
        assert_error(
            from_file("[colours]\nred = 1\n"),
            &["no such setting: colours.red"],
        );
    }

    #[test]
    fn a_wrong_value_is_shown_where_it_is() {
        assert_error(
            from_file("[limits]\nconnections_max = \"many\"\n"),
            &[
                "limits.connections_max should be a number above 0 or \"unlimited\", and not \"many\"",
                "midge.toml:2:19",
            ],
        );
        assert_error(
            from_file("[store]\nkind = \"mongo\"\n"),
            &["\"embedded\" or \"memory\" or \"mongodb\", and not \"mongo\""],
        );
        assert_error(
            from_file("[log]\nlevel = 3\n"),
            &["log.level should be a text, and not 3"],
        );
        assert_error(
            from_file("[log]\nlevel = \"loud\"\n"),
            &["log.level should be a level", "midge.toml:2:9"],
        );
    }

    #[test]
    fn a_file_that_is_not_toml_is_shown_with_the_line() {
        assert_error(from_file("[limits\n"), &["midge.toml:1:8"]);
        let sources = Sources {
            file: Some("/nowhere/midge.toml".into()),
            ..Sources::default()
        };
        assert_error(
            Config::load(&sources),
            &["cannot read /nowhere/midge.toml", "hint: "],
        );
    }

    #[test]
    fn variables_and_arguments_are_named_in_errors() {
        assert_error(
            from_environment(&[("MIDGE_LIMITS__CONECTIONS_MAX", "1")]),
            &[
                "MIDGE_LIMITS__CONECTIONS_MAX: ",
                "did you mean MIDGE_LIMITS__CONNECTIONS_MAX?",
            ],
        );
        assert_error(
            from_environment(&[("MIDGE_AUTH_ANONYMOUS", "true")]),
            &["did you mean MIDGE_AUTH__ANONYMOUS?"],
        );
        assert_error(
            from_set(&[("limits.connections_max", "x")]),
            &["--set limits.connections_max: "],
        );
    }

    #[test]
    fn all_problems_are_reported() {
        let error = from_file("[limits]\nfoo = 1\ntopic_levels_max = 0\n").unwrap_err();
        assert_eq!(error.0.len(), 2, "{error}");

        let error = from_set(&[
            ("limits.client_id_bytes_max", "22"),
            ("limits.keep_alive_max", "1d"),
        ])
        .unwrap_err();
        assert_eq!(error.0.len(), 2, "{error}");
    }

    #[test]
    fn variables_that_are_no_settings_are_left_alone() {
        let config = from_environment(&[
            ("PATH", "/bin"),
            ("MIDGE_CONFIG", "x"),
            ("MIDGE_TEST_URL", "x"),
            ("MIDGE_SERVICE_HOST", "10.0.0.1"),
            ("MIDGE_SERVICE_PORT", "1883"),
            ("MIDGE_SERVICE_PORT_MQTT", "1883"),
            ("MIDGE_PORT", "tcp://10.0.0.1:1883"),
            ("MIDGE_PORT_1883_TCP", "tcp://10.0.0.1:1883"),
            ("MIDGE_PORT_1883_TCP_ADDR", "10.0.0.1"),
            ("MIDGE_METRICS_SERVICE_HOST", "10.0.0.2"),
        ]);

        assert_eq!(config.unwrap(), Config::default());
    }

    #[test]
    fn text_that_looks_like_a_number_is_text_for_a_text() {
        assert_eq!(
            from_environment(&[("MIDGE_NODE__NAME", "7")])
                .unwrap()
                .node
                .name,
            "7"
        );
        assert_eq!(
            from_set(&[("store.kind", "memory")]).unwrap().store.kind,
            StoreKind::Memory
        );
    }

    #[test]
    fn a_variable_rebinds_the_default_listener() {
        let config = from_environment(&[
            ("MIDGE_LISTENERS__TCP__BIND", "0.0.0.0:1884"),
            ("MIDGE_AUTH__ANONYMOUS", "true"),
        ]);

        let listeners = config.unwrap().listeners;
        assert_eq!(listeners.len(), 1);
        assert_eq!(listeners["tcp"].bind, ([0, 0, 0, 0], 1884).into());
    }

    #[test]
    fn configured_listeners_replace_the_default_one() {
        let listeners = from_file("[listeners.ws]\n").unwrap().listeners;

        assert_eq!(listeners.len(), 1);
        assert_eq!(listeners["ws"].bind, ([127, 0, 0, 1], 8083).into());
        assert!(
            matches!(&listeners["ws"].transport, Transport::WebSocket { path, .. } if path == "/mqtt")
        );
    }

    #[test]
    fn a_bind_is_an_address_a_port_or_both() {
        for (bind, address) in [
            ("\"0.0.0.0:1\"", "0.0.0.0:1"),
            ("\"[::1]:2\"", "[::1]:2"),
            ("\"::1\"", "[::1]:1883"),
            ("\"localhost:3\"", "127.0.0.1:3"),
            ("\"10.0.0.1\"", "10.0.0.1:1883"),
            ("\"4\"", "0.0.0.0:4"),
            ("\":5\"", "0.0.0.0:5"),
            ("6", "0.0.0.0:6"),
        ] {
            let config = from_file(&format!(
                "auth.anonymous = true\n[listeners.x]\nbind = {bind}\n"
            ));
            assert_eq!(
                config.unwrap().listeners["x"].bind.to_string(),
                address,
                "{bind}"
            );
        }
        for bind in [
            "\"\"",
            "\"example.org:1883\"",
            "\"1.2.3.4:99999\"",
            "70000",
            "-1",
            "true",
        ] {
            assert_error(
                from_file(&format!("listeners.x.bind = {bind}\n")),
                &["listeners.x.bind should be an address"],
            );
        }
    }

    #[test]
    fn an_open_listener_needs_a_decision_about_who_may_connect() {
        let open = "listeners.tcp.bind = \"0.0.0.0:1883\"\n";

        assert_error(
            from_file(open),
            &[
                "listener `tcp` can be reached",
                "midge.toml:1:22",
                "auth.users_file",
                "auth.anonymous = true",
            ],
        );
        assert!(
            from_file(&format!("{open}auth.anonymous = true\n"))
                .unwrap()
                .auth
                .allows_anonymous()
        );
        let with_users = from_file(&format!("{open}auth.users_file = \"users.toml\"\n")).unwrap();
        assert!(!with_users.auth.allows_anonymous());
        assert_error(
            from_file("auth.anonymous = false\n"),
            &["nobody could connect"],
        );
    }

    #[test]
    fn mongodb_needs_one_uri_and_the_other_stores_none() {
        let config = from_file("[store]\nkind = \"mongodb\"\nuri = \"mongodb://db1\"\n").unwrap();
        assert_eq!(
            config.store.mongodb_uri().unwrap().secret(),
            "mongodb://db1"
        );
        assert_eq!(config.store.database, "midge");

        assert_error(
            from_file("[store]\nkind = \"mongodb\"\n"),
            &[
                "nothing says where MongoDB is",
                "midge.toml:2:8",
                "store.uri_file",
            ],
        );
        assert_error(
            from_set(&[
                ("store.kind", "mongodb"),
                ("store.uri", "mongodb://db1"),
                ("store.uri_file", "uri"),
            ]),
            &["both set"],
        );
        assert_error(
            from_environment(&[("MIDGE_STORE__URI", "mongodb://db1")]),
            &["MIDGE_STORE__URI: store.uri has no effect with store.kind = \"embedded\""],
        );
        assert_error(
            from_set(&[("store.uri", "db1:27017")]),
            &["store.uri should be a URI such as", "and not \"db1:27017\""],
        );
        assert_error(
            from_set(&[("store.write_elision", "false")]),
            &["store.write_elision has no effect with store.kind = \"embedded\""],
        );
        for database in ["a/b", "local", "sp ace"] {
            assert_error(
                from_set(&[("store.database", database)]),
                &["store.database should be"],
            );
        }
    }

    #[test]
    fn redis_needs_one_url_and_a_store_that_nodes_share() {
        let shared = [("store.kind", "mongodb"), ("store.uri", "mongodb://db1")];
        let with = |pairs: &[(&str, &str)]| from_set(&[&shared, pairs].concat());
        let config = with(&[("bus.kind", "redis"), ("bus.url", "redis://cache")]).unwrap();
        let url = config.bus.redis_url().unwrap().unwrap();
        assert_eq!(url.secret(), "redis://cache");

        assert_error(with(&[("bus.kind", "redis")]), &["where Redis is"]);
        assert_error(with(&[("bus.kind", "none")]), &["they need a bus"]);
        assert_error(
            with(&[("bus.url", "redis://cache")]),
            &["bus.url has no effect"],
        );
        assert_error(
            with(&[
                ("bus.kind", "redis"),
                ("bus.url", "redis://cache"),
                ("bus.url_file", "url"),
            ]),
            &["both set"],
        );
        assert_error(
            from_set(&[("bus.kind", "redis"), ("bus.url", "redis://cache")]),
            &["store.kind = \"embedded\" is for one node alone"],
        );
        assert_error(
            from_file("[bus]\nurl = \"cache:6379\"\n"),
            &[
                "bus.url should be a URL such as \"redis://cache:6379\"",
                "midge.toml:2:7",
            ],
        );
        assert_error(
            from_file("[bus]\nurl = \"redis+cluster://:pass@one,two/1\"\n"),
            &["\"redis+cluster://one,two,three\", which has no database"],
        );
    }

    #[test]
    fn the_url_of_redis_can_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("url");
        let bus = Bus {
            url_file: Some(path.clone()),
            ..Bus::default()
        };
        std::fs::write(&path, "rediss://:secret@cache\n").unwrap();
        let url = bus.redis_url().unwrap().unwrap();
        assert_eq!(url.secret(), "rediss://:secret@cache");

        std::fs::write(&path, "cache").unwrap();
        let error = bus.redis_url().unwrap_err().to_string();
        assert!(error.contains("should hold a URL such as"), "{error}");
    }

    #[test]
    fn the_uri_of_mongodb_can_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uri");
        std::fs::write(&path, "mongodb://me:pass@db1/\n").unwrap();
        let path = path.to_str().unwrap();
        let variables = [
            ("MIDGE_STORE__KIND", "mongodb"),
            ("MIDGE_STORE__URI_FILE", path),
        ];
        let store = from_environment(&variables).unwrap().store;
        assert_eq!(
            store.mongodb_uri().unwrap().secret(),
            "mongodb://me:pass@db1/"
        );

        std::fs::write(path, "me:pass@db1").unwrap();
        let error = store.mongodb_uri().unwrap_err().to_string();
        assert!(error.contains("should hold a URI"), "{error}");
        assert!(!error.contains("pass"), "{error}");
    }

    #[test]
    fn the_password_of_mongodb_is_in_no_message() {
        let uri = "\"mongodb://me:pass@db1/\"";
        let wrong = [
            format!("[store]\nuri = {uri}\n"),
            format!("[store]\nuri = {uri} oops\n"),
            format!("[store]\nkind = {uri}\n"),
            format!("[store]\nuri = [{uri}]\n"),
        ];
        for text in wrong {
            let error = from_file(&text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("pass"), "{error}");
            assert!(
                error.to_string().contains("mongodb://me:****@db1/"),
                "{error}"
            );
        }

        let (_folder, sources) = file(&format!("[store]\nkind = \"mongodb\"\nuri = {uri}\n"));
        let loaded = Loaded::new(&sources).unwrap();
        assert!(
            loaded
                .to_toml()
                .contains("uri = \"mongodb://me:****@db1/\"")
        );
        assert!(!format!("{loaded:?}").contains("pass"));
    }

    #[test]
    fn required_certificates_say_who_may_connect() {
        let config = from_file(
            "[listeners.tls]\nbind = 8883\n\
             tls = { certificate = \"c\", key = \"k\", client_ca = \"ca\", client_auth = \"required\" }\n",
        )
        .unwrap();

        let client_auth = &config.listeners["tls"].tls.as_ref().unwrap().client_auth;
        assert_eq!(*client_auth, ClientAuth::Required { ca: "ca".into() });
    }

    #[test]
    fn a_listener_has_what_its_kind_needs_and_nothing_else() {
        assert_error(
            from_file("[listeners.tls]\n"),
            &[
                "tls.certificate is missing",
                "tls.key is missing",
                "midge.toml:1:",
            ],
        );
        assert_error(
            from_file("[listeners.tcp]\npath = \"/\"\n"),
            &["is only for the kinds \"ws\" and \"wss\""],
        );
        assert_error(
            from_file("[listeners.tcp.tls]\nkey = \"k\"\n"),
            &["is only for the kinds \"tls\" and \"wss\""],
        );
        assert_error(
            from_file("[listeners.ws]\npath = \"mqtt\"\n"),
            &["must begin with `/`"],
        );
        assert_error(
            from_file(
                "[listeners.tls.tls]\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"ca\"\n",
            ),
            &["has no effect without tls.client_auth"],
        );
        assert_error(
            from_file("[listeners.a]\n[listeners.b]\n"),
            &["listeners `a` and `b` both want 127.0.0.1:1883"],
        );
        assert_error(from_file("[listeners.A]\n"), &["the name of a listener"]);
    }

    #[test]
    fn what_is_shown_sets_the_same_and_says_where_it_is_from() {
        let (_folder, mut sources) = file(
            "[limits]\ntopic_alias_maximum = 7\n[listeners.wss]\n\
             tls = { certificate = \"c\", key = \"k\" }\n",
        );
        sources.set = pairs(&[("session.expiry_max", "unlimited"), ("sys.interval", "off")]);
        let loaded = Loaded::new(&sources).unwrap();

        let shown = loaded.to_toml();

        assert_eq!(from_file(&shown).unwrap(), loaded.config, "{shown}");
        assert!(shown.contains("midge.toml:2"), "{shown}");
        assert!(shown.contains("# --set session.expiry_max"), "{shown}");
        assert!(shown.contains("# anonymous is not set\n"), "{shown}");
    }
}
