//! Keys of disks on a web server: address, trust and requests, and the conflicts among them and with the login.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::login::{Login, LoginArgs};
use super::outcome::UsageError;
use super::server_args::ServerArgs;
use super::{scheme, values};
use crate::config::{HttpsAddress, HttpsConfig, HttpsServer, LocalConfig, NamedBy, Secret, Thumbprint, Trust};
use crate::store::https::{percent_decode, split_datastore};

/// Keys of one web server, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct HttpsArgs {
    /// Keys that are settings of the server as they are.
    pub(super) http: HttpsServer,
    /// `cookie-script=`
    pub(super) cookie_script: Option<Secret>,
    /// `cookie-script-renew=`
    pub(super) cookie_renew: Option<Duration>,
    /// `thumbprint=`
    pub(super) thumbprint: Option<Thumbprint>,
    /// `datacenter=`
    pub(super) datacenter: Option<String>,
    /// `cainfo=`
    pub(super) cainfo: Option<PathBuf>,
    /// `insecure=`
    pub(super) insecure: bool,
}

/// Source on a web server, as given.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum HttpsSource {
    /// `url=`
    Url(String),
    /// `file=`, with `server=`.
    File(String),
    /// The same for a folder to list.
    Folder(String),
    /// `server=` alone, to list its datacenters.
    Server,
}

impl HttpsArgs {
    /// Returns the configuration of a disk, without the disk cache, and what to tell the user about it. `image`: the keys of
    /// image files, of which those that hold for a web server count. `parent`: the value of `parent=`.
    ///
    /// Fails if keys conflict, or if an address is not valid.
    pub(super) fn config(
        &self,
        source: HttpsSource,
        server: &ServerArgs,
        login: &LoginArgs,
        image: &LocalConfig,
        parent: Option<&OsStr>,
    ) -> Result<(HttpsConfig, Vec<&'static str>), UsageError> {
        let mut warnings = Vec::new();
        let trust = self.trust(&mut warnings)?;
        let mut login = login.login(&mut warnings);
        let address = match source {
            HttpsSource::Url(url) => self.url(&url, server, &mut login, &mut warnings)?,
            HttpsSource::File(file) => self.datastore("file", &file, server)?,
            HttpsSource::Folder(folder) => self.folder(&folder, server)?,
            HttpsSource::Server => HttpsAddress::Server {
                server: server.host.clone().unwrap_or_default(),
                port: server.port_number()?,
                datacenter: self.datacenter.clone(),
            },
        };
        let parent = parent.map(|parent| self.parent(parent, server)).transpose()?;
        self.check_login(&login)?;
        let disk = HttpsConfig {
            cache_dir: None,
            address,
            server: self.http_server(login, trust, server),
            format: image.format,
            degraded: image.degraded,
            parent,
            member: image.member.clone(),
            named: NamedBy::File,
        };
        Ok((disk, warnings))
    }

    fn http_server(&self, login: Login, trust: Trust, server: &ServerArgs) -> HttpsServer {
        let script = self.cookie_script.clone();
        HttpsServer {
            user: login.user,
            password: login.password,
            cookie: login.cookie,
            cookie_script: script.map(|script| (script, self.cookie_renew)),
            trust,
            connections: server.connections,
            timeout: server.timeout,
            retry: server.retry,
            ..self.http.clone()
        }
    }

    /// Fails if a part of the login is missing, or is given in two ways.
    fn check_login(&self, login: &Login) -> Result<(), UsageError> {
        let (has_user, has_password) = (login.user.is_some(), login.password.is_some());
        if has_password && !has_user {
            return Err(UsageError::of("password", " needs user="));
        }
        let is_authorization = |(name, _): &(String, Secret)| name.eq_ignore_ascii_case("authorization");
        if has_password && self.http.headers.iter().any(is_authorization) {
            return Err(UsageError::of(
                "header",
                ": with user= and password= the program sets authorization itself; give one of both",
            ));
        }
        if self.cookie_renew.is_some() && self.cookie_script.is_none() {
            return Err(UsageError::of("cookie-script-renew", " needs cookie-script="));
        }
        if self.cookie_script.is_some() && (login.cookie.is_some() || has_password) {
            return Err(UsageError::of(
                "cookie-script",
                " prints the cookie of a login: it takes the place of cookie= and password=",
            ));
        }
        if has_user && !has_password && login.cookie.is_none() && self.cookie_script.is_none() {
            return Err(UsageError::of("user", " needs password= (password=- asks for it)"));
        }
        Ok(())
    }

    fn trust(&self, warnings: &mut Vec<&'static str>) -> Result<Trust, UsageError> {
        match (&self.thumbprint, &self.cainfo, self.insecure) {
            (None, None, false) => Ok(Trust::System),
            (Some(thumbprint), None, false) => Ok(Trust::Pinned(thumbprint.clone())),
            (None, Some(path), false) => Ok(Trust::File(path.clone())),
            (None, None, true) => {
                warnings.push("insecure=true: the server's certificate is not verified");
                Ok(Trust::Any)
            }
            _ => Err(UsageError::new(
                "thumbprint=, cainfo= and insecure=true are three ways to trust a server: give one of them",
            )),
        }
    }

    /// Returns the address of `url=`. Its credentials replace those of the keys, with a warning.
    fn url(
        &self,
        url: &str,
        server: &ServerArgs,
        login: &mut Login,
        warnings: &mut Vec<&'static str>,
    ) -> Result<HttpsAddress, UsageError> {
        let given = [
            ("server", server.host.is_some()),
            ("datacenter", self.datacenter.is_some()),
            ("port", server.port.is_some()),
        ];
        if let Some((key, _)) = given.iter().find(|(_, given)| *given) {
            let rest = format_args!(" is a whole address, but {key}= is given too");
            return Err(UsageError::of("url", rest));
        }
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let Some((userinfo, host)) = authority.rsplit_once('@') else {
            return Ok(HttpsAddress::Url(url.to_owned()));
        };
        let decode = |text: &str| String::from_utf8_lossy(&percent_decode(text)).into_owned();
        let (name, secret) = userinfo
            .split_once(':')
            .map_or((userinfo, None), |(name, secret)| (name, Some(secret)));
        login.user = Some(decode(name));
        if let Some(secret) = secret {
            login.password = Some(Secret::new(decode(secret)));
            warnings.push(
                "url=: a password in an address shows in process listings at the start; use user= and password=+FILE",
            );
        }
        if scheme.eq_ignore_ascii_case("http") {
            warnings.push("url=: the password goes over the network unencrypted (http)");
        }
        Ok(HttpsAddress::Url(format!("{scheme}://{host}{path}")))
    }

    /// Returns the address of `parent=`: a file in a datastore, or a URL without credentials.
    fn parent(&self, parent: &OsStr, server: &ServerArgs) -> Result<HttpsAddress, UsageError> {
        let parent = parent.to_str();
        let parent = parent.ok_or_else(|| UsageError::of("parent", ": the value is not UTF-8"))?;
        match scheme::is_one_of(&scheme::WEB, OsStr::new(parent)) {
            true if parent.contains('@') => Err(UsageError::of(
                "parent",
                ": give the credentials with user= and password=",
            )),
            true => Ok(HttpsAddress::Url(parent.to_owned())),
            false => self.datastore("parent", parent, server),
        }
    }

    /// Returns the address of the file in a datastore that `key` names.
    fn datastore(&self, key: &'static str, file: &str, server: &ServerArgs) -> Result<HttpsAddress, UsageError> {
        let error = |reason: &str| UsageError::of(key, format_args!("{file}: {reason}"));
        let Some((datastore, path)) = split_datastore(file.as_bytes()) else {
            return Err(error("a disk on server= has the form \"[datastore] folder/disk.vmdk\""));
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let path = text(path);
        if path.ends_with('/') {
            return Err(error(&format!(
                "is a folder; --list shows what is in it, and {file}*.vmdk means all its disks"
            )));
        }
        self.in_datastore(key, file, text(datastore), path, server)
    }

    /// Returns the address of a folder to list: `[datastore] folder/`, or `[datastore]` for all of it.
    fn folder(&self, folder: &str, server: &ServerArgs) -> Result<HttpsAddress, UsageError> {
        let whole = folder
            .strip_prefix('[')
            .and_then(|rest| rest.trim_end_matches(['/', ' ']).strip_suffix(']'));
        match whole.filter(|name| !name.is_empty() && !name.contains(']')) {
            Some(datastore) => self.in_datastore("file", folder, datastore.to_owned(), String::new(), server),
            None => self.datastore("file", folder.trim_end_matches('/'), server),
        }
    }

    fn in_datastore(
        &self,
        key: &'static str,
        file: &str,
        datastore: String,
        path: String,
        server: &ServerArgs,
    ) -> Result<HttpsAddress, UsageError> {
        let error = |reason: &str| UsageError::of(key, format_args!("{file}: {reason}"));
        if path.split('/').any(|part| part == "..") {
            return Err(error("expected a path in the datastore, without .."));
        }
        let host = server.host.clone();
        let host = host.ok_or_else(|| error("a disk in a datastore needs server="))?;
        Ok(HttpsAddress::Datastore {
            server: host,
            port: server.port_number()?,
            datacenter: self.datacenter.clone(),
            datastore,
            path,
        })
    }
}

/// Parses the value of `url=`. The value is in no message: it may hold a password.
pub(super) fn url(value: &OsStr) -> Result<HttpsSource, String> {
    let text = values::text(value)?;
    let is_whole = |scheme: &&str| text.len() > scheme.len() && scheme::is_one_of(&[scheme], value);
    let known = scheme::WEB.iter().any(is_whole);
    if !known {
        return Err("must start with https:// or http:// and a host".into());
    }
    Ok(HttpsSource::Url(text.to_owned()))
}

/// Parses the value of `thumbprint=`.
pub(super) fn thumbprint(value: &OsStr) -> Result<Thumbprint, String> {
    let parsed = Thumbprint::parse(values::text(value)?);
    parsed.ok_or_else(|| "must be the SHA-1 (20 hexadecimal pairs) or SHA-256 (32) of the server's certificate".into())
}

/// Parses the value of `header=`: a name, a colon and a value.
pub(super) fn header(value: &OsStr) -> Result<(String, Secret), String> {
    /// Headers that the program sets itself, with the key that is meant for some.
    const OWN: [(&str, &str); 14] = [
        ("connection", ""),
        ("expect", ""),
        ("keep-alive", ""),
        ("proxy-authorization", "; use proxy="),
        ("te", ""),
        ("trailer", ""),
        ("transfer-encoding", ""),
        ("upgrade", ""),
        ("range", ""),
        ("if-range", ""),
        ("accept-encoding", ""),
        ("host", "; resolve= gives a name another address"),
        ("content-length", ""),
        ("cookie", "; use cookie="),
    ];
    let text = values::text(value)?;
    let (name, value) = text.split_once(':').ok_or("must have the form NAME: VALUE")?;
    if let Some((own, hint)) = OWN.iter().find(|(own, _)| name.eq_ignore_ascii_case(own)) {
        return Err(format!("the program sets {own} itself{hint}"));
    }
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let is_value = value.bytes().all(|b| b == b'\t' || (b >= b' ' && b != 0x7f));
    match is_name && is_value {
        true => Ok((name.to_owned(), Secret::new(value.trim()))),
        false => Err("must have the form NAME: VALUE, without control characters".into()),
    }
}

/// Parses the value of `cookie-script-renew=`; 0 means never.
pub(super) fn renewal(value: &OsStr) -> Result<Duration, String> {
    values::number(value, 0, u32::MAX).map(|seconds| Duration::from_secs(seconds.into()))
}

/// Parses the value of `proxy=`.
pub(super) fn proxy(value: &OsStr) -> Result<Secret, String> {
    let text = values::text(value)?;
    match scheme::is_one_of(&scheme::WEB, value) {
        true => Ok(Secret::new(text)),
        false => Err("must be the http:// or https:// address of a proxy".into()),
    }
}

/// Parses the value of `resolve=`: a host name, perhaps a port as curl wants it, and an address.
pub(super) fn resolve(value: &OsStr) -> Result<(String, IpAddr), String> {
    let text = values::text(value)?;
    let (host, mut address) = text.split_once(':').unwrap_or_default();
    if let Some((port, rest)) = address.split_once(':')
        && address.parse::<IpAddr>().is_err()
        && port.parse::<u16>().is_ok()
    {
        address = rest;
    }
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<IpAddr>().ok().filter(|_| !host.is_empty());
    let address = address.ok_or("must have the form HOST:ADDRESS, with an IP address")?;
    Ok((host.to_ascii_lowercase(), address))
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{action, disks, warnings, web};
    use super::*;
    use crate::config::{Locality, SourceConfig, SourceSettings};

    const LOGIN: [&str; 2] = ["user=root", "password=secret"];

    #[test]
    fn a_file_in_a_datastore_is_bound_to_its_server() {
        let disk = web(&[
            &["server=esx", "datacenter=A/B", "port=8443", "file=[my ds] a b/x.vmdk"],
            &LOGIN[..],
        ]
        .concat());
        let expected = HttpsAddress::Datastore {
            server: "esx".to_owned(),
            port: Some(8443),
            datacenter: Some("A/B".to_owned()),
            datastore: "my ds".to_owned(),
            path: "a b/x.vmdk".to_owned(),
        };
        assert_eq!(disk.address, expected);
        assert_eq!(disk.label(), "[my ds] a b/x.vmdk");
        let config = disks(&["src", "server=esx", "[my ds] a b/x.vmdk"]).remove(0);
        assert_eq!(
            (config.name.to_str(), config.source.settings().locality()),
            (Some("x.raw"), Locality::OtherMachine)
        );
    }

    #[test]
    fn credentials_in_an_address_are_taken_out_of_it_with_a_warning() {
        let disk = web(&["https://us%40er:p%3Aw@h/folder/a.vmdk?dsName=d"]);
        assert_eq!(
            disk.address,
            HttpsAddress::Url("https://h/folder/a.vmdk?dsName=d".to_owned())
        );
        assert_eq!(disk.label(), "https://h/folder/a.vmdk");
        assert_eq!(disk.server.user.as_deref(), Some("us@er"));
        assert_eq!(disk.server.password, Some(Secret::new("p:w")));
        assert_eq!(warnings(&["https://u:p@h/a.vmdk"]), 1);
        assert_eq!(warnings(&["http://u:p@h/a.vmdk"]), 2);
    }

    #[test]
    fn headers_addresses_and_proxies_are_checked() {
        let server = web(&[
            "header=X-One: a b",
            "https://h/x.vmdk",
            "header=Two:c",
            "resolve=H.example:10.0.0.1",
            "resolve=i:443:[::1]",
            "proxy=http://u:p@proxy:3128",
        ])
        .server;
        let expected = [("X-One", "a b"), ("Two", "c")].map(|(name, value)| (name.to_owned(), Secret::new(value)));
        assert_eq!(server.headers, expected);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let expected = [
            ("h.example".to_owned(), address("10.0.0.1")),
            ("i".to_owned(), address("::1")),
        ];
        assert_eq!(server.resolve, expected);
        assert_eq!(server.proxy, Some(Secret::new("http://u:p@proxy:3128")));
        for (word, message) in [
            ("header=hunter2", "must have the form"),
            ("header=A: hunter2\nB: c", "without control characters"),
            ("header=Range: hunter2", "sets range itself"),
            ("header=cookie: hunter2", "use cookie="),
            ("header=Transfer-Encoding: hunter2", "sets transfer-encoding itself"),
            ("header=HOST: hunter2", "resolve= gives a name another address"),
            ("resolve=h", "HOST:ADDRESS"),
            ("resolve=h:name", "HOST:ADDRESS"),
            ("proxy=socks5://hunter2", "http:// or https://"),
        ] {
            let error = action(&["src", "https://h/x.vmdk", word]).unwrap_err();
            assert!(error.contains(message) && !error.contains("hunter2"), "{word}: {error}");
        }
    }

    #[test]
    fn conflicts_are_explained_and_show_no_secret() {
        let cases: &[(&[&str], &str)] = &[
            (
                &["server=h", "file=/a.vmdk"],
                "has the form \"[datastore] folder/disk.vmdk\"",
            ),
            (&["server=h", "file=[d] ../a.vmdk"], "without .."),
            (&["server=h"], "no disk is given"),
            (&["server=https://h", "file=[d] a"], "must be a host name"),
            (&["file=/a.vmdk", "user=u"], "user= is for disks on a web server"),
            (&["nbd://h", "user=u"], "user= is for disks on a web server"),
            (&["https://h/a.vmdk", "user=u"], "user= needs password="),
            (&["https://h/a.vmdk", "password=hunter2"], "password= needs user="),
            (&["https://h/a.vmdk", "server=h"], "server= is given too"),
            (
                &[
                    "https://h/a.vmdk",
                    "user=u",
                    "password=hunter2",
                    "header=Authorization: hunter2",
                ],
                "give one of both",
            ),
            (&["https://h/a.vmdk", "lock=off"], "lock= does not fit"),
            (&["https://h/a.vmdk", "tls=on"], "tls= does not fit"),
            (&["https://h/a.vmdk", "backend=nbd"], "needs backend=https"),
            (&["file=/a.vmdk", "backend=https"], "has the form"),
            (&["uri=nbd://h", "backend=https"], "backend=https needs url="),
            (
                &["https://h/a.vmdk", "insecure=on", "thumbprint=0123"],
                "must be the SHA-1",
            ),
            (
                &["https://h/a.vmdk", "insecure=on", "cainfo=/ca"],
                "three ways to trust",
            ),
            (&["url=ftp://u:hunter2@h/a"], "url=: must start with https://"),
            (
                &["https://h/a.vmdk", "user=u", "password=+/none/hunter"],
                "password=: /none/hunter: No such",
            ),
            (&["server=h", "port=x", "file=[d] a.vmdk"], "is a number"),
        ];
        for (args, message) in cases {
            let error = action(&[&["src"], *args].concat()).unwrap_err();
            assert!(
                error.contains(message) && !error.contains("hunter2"),
                "{args:?}: {error}"
            );
        }
        let error = action(&["--create", "https://h/a.vmdk", "create-size=1M"]).unwrap_err();
        assert!(error.contains("create-size= does not fit"), "{error}");
    }

    #[test]
    fn servers_and_folders_are_listed() {
        let address = |args: &[&str]| match &disks(&[&["--list"], args].concat())[..] {
            [disk] => match &disk.source {
                SourceConfig::Https(https) => https.address.clone(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        let server = address(&["server=h", "port=8443", "datacenter=A/B"]);
        let expected = HttpsAddress::Server {
            server: "h".to_owned(),
            port: Some(8443),
            datacenter: Some("A/B".to_owned()),
        };
        assert_eq!(server, expected);
        for (folder, path) in [
            ("[my ds] vm [1]/", "vm [1]"),
            ("[my ds] a/b", "a/b"),
            ("[my ds]", ""),
            ("[my ds] /", ""),
        ] {
            let listed = address(&["server=h", folder]);
            let is_right = matches!(&listed, HttpsAddress::Datastore { datastore, path: p, .. } if datastore == "my ds" && p == path);
            assert!(is_right, "{folder}: {listed:?}");
        }
        assert_eq!(address(&["https://h/d/"]), HttpsAddress::Url("https://h/d/".to_owned()));
        for (args, message) in [
            (&["server=h", "file=[d] ../a/"][..], "without .."),
            (&["server=h", "file=/a/"], "has the form"),
            (&["server=h", "libdir=/v", "file=[d] a.vmdk", "vm=moref=1"], ""),
        ] {
            let error = action(&[&["--list"], args].concat()).unwrap_err();
            assert!(error.contains(message), "{args:?}: {error}");
        }
        let error = action(&["src", "server=h", "file=[d] a/"]).unwrap_err();
        assert!(
            error.contains("is a folder") && error.contains("[d] a/*.vmdk"),
            "{error}"
        );
    }

    #[test]
    fn keys_of_a_disk_replace_common_ones_and_trust_is_one_choice() {
        let args = [
            "src",
            "server=h",
            "cainfo=/ca",
            "[d] a.vmdk",
            "[d] b.vmdk",
            "insecure=on",
        ];
        let trust = disks(&args).into_iter().map(|disk| match disk.source {
            SourceConfig::Https(https) => https.server.trust,
            other => panic!("{other:?}"),
        });
        assert_eq!(trust.collect::<Vec<_>>(), [Trust::File("/ca".into()), Trust::Any]);
    }
}
