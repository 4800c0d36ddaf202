//! The servers of the tests.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, free_port, need, need_fuse, poll_until};
use nix::fcntl::{Flock, FlockArg};

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// User and password of all servers.
pub(crate) const USER: &str = "root";
pub(crate) const PASSWORD: &str = "se%cr+et@1";

/// Server process with TLS on a port of this machine. Killed on drop.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: u16,
    log: PathBuf,
    /// Socket of nginx that answers once everything before is in the log.
    barrier: Option<PathBuf>,
    /// SHA-1 of the certificate.
    pub(crate) thumbprint: String,
    pub(crate) certificate: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // nginx's worker ends with its master, which has to be told for that.
        let group = nix::unistd::Pid::from_raw(-(self.child.id() as i32));
        let _ = nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts the simulator with the files of `dir` in its datastore `LocalDS_0`.
    pub(crate) fn vsim(scratch: &Scratch, dir: &Path, words: &[&str]) -> Self {
        let (certificate, key) = certificate(scratch);
        let log = scratch.path("vsim.log");
        let mut command = Command::new(vsim_program());
        command.arg("-dir").arg(dir).arg("-log").arg(&log);
        command.arg("-cert").arg(&certificate).arg("-key").arg(&key);
        command.args(["-u", USER, "-p", PASSWORD]).args(words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child = command.spawn().expect("starting the simulator");
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).find(|line| line.starts_with("ready "));
        let ready = ready.expect("the simulator did not come up");
        let port = ready.split("127.0.0.1:").nth(1).unwrap();
        let port = port.split('/').next().unwrap().parse().unwrap();
        Self::new(child, port, log, certificate)
    }

    /// Starts nginx with the files of `dir`, which need the login below `/private`. `extra`: lines of its server block.
    pub(crate) fn nginx(scratch: &Scratch, dir: &Path, extra: &str) -> Self {
        Self::nginx_with(scratch, dir, extra, false)
    }

    /// The same, with HTTP/2 where `http2` is true.
    pub(crate) fn nginx_with(scratch: &Scratch, dir: &Path, extra: &str, http2: bool) -> Self {
        let http2 = if http2 { "http2" } else { "" };
        let (certificate, key) = certificate(scratch);
        let (run, log, port) = (scratch.mkdir("nginx"), scratch.path("nginx.log"), free_port());
        fs::write(run.join("users"), format!("{USER}:{{PLAIN}}{PASSWORD}\n")).unwrap();
        let user = if nix::unistd::geteuid().is_root() {
            "user root;"
        } else {
            ""
        };
        let (run_text, dir, log_text) = (run.display(), dir.display(), log.display());
        let conf = format!(
            "{user} daemon off; pid {run_text}/pid; error_log {run_text}/error.log; worker_processes 1;\n\
             events {{ worker_connections 64; }}\n\
             http {{ access_log off; client_body_temp_path {run_text}/a; proxy_temp_path {run_text}/b;\n\
             fastcgi_temp_path {run_text}/c; uwsgi_temp_path {run_text}/d; scgi_temp_path {run_text}/e;\n\
             log_format t '$request_method $uri status=$status bytes=$body_bytes_sent range=$http_range $server_protocol';\n\
             server {{ listen 127.0.0.1:{port} ssl {http2}; ssl_certificate {}; ssl_certificate_key {};\n\
             access_log {log_text} t; root {dir}; {extra}\n\
             location /private/ {{ auth_basic x; auth_basic_user_file {run_text}/users; }} }}\n\
             server {{ listen unix:{run_text}/barrier; return 204; }} }}\n",
            certificate.display(),
            key.display()
        );
        let barrier = run.join("barrier");
        // A server that was killed leaves its socket behind, and nginx does not replace it.
        let _ = fs::remove_file(&barrier);
        let conf_file = run.join("conf");
        fs::write(&conf_file, conf).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-c").arg(&conf_file).arg("-p").arg(&run);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        command.stderr(File::create(run.join("stderr")).unwrap());
        let child = command.spawn().expect("starting nginx");
        let mut server = Self::new(child, port, log, certificate);
        let up = poll_until(SOON, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok() && UnixStream::connect(&barrier).is_ok()
        });
        server.barrier = Some(barrier);
        assert!(up, "nginx: {}", fs::read_to_string(run.join("stderr")).unwrap());
        server
    }

    fn new(child: Child, port: u16, log: PathBuf, certificate: PathBuf) -> Self {
        let printed = Cmd::new("certtool")
            .args(["--fingerprint", "--hash=sha1", "--infile"])
            .arg(&certificate)
            .run()
            .ok();
        let thumbprint = printed.stdout.trim().to_owned();
        Self {
            child,
            port,
            log,
            barrier: None,
            thumbprint,
            certificate,
        }
    }

    /// Returns the address of a file.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}/{path}", self.port)
    }

    /// Returns `thumbprint=` of the server.
    pub(crate) fn pin(&self) -> String {
        format!("thumbprint={}", self.thumbprint)
    }

    /// Returns the keys of a login at a simulator.
    pub(crate) fn login(&self, scratch: &Scratch) -> Vec<String> {
        vec![
            "server=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            self.pin(),
            format!("user={USER}"),
            password_file(scratch),
        ]
    }

    /// Returns the lines of the server's log: those of all requests whose answers have come.
    pub(crate) fn log(&self) -> Vec<String> {
        // nginx logs a request after it has sent the answer. It has one thread, which takes no other request meanwhile.
        if let Some(barrier) = &self.barrier {
            let mut stream = UnixStream::connect(barrier).unwrap();
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.contains(" 204 "), "{answer}");
        }
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Returns the number of lines of the server's log that hold all of `words`.
    pub(crate) fn count(&self, words: &[&str]) -> usize {
        let holds = |line: &&String| words.iter().all(|word| line.contains(word));
        self.log().iter().filter(holds).count()
    }

    /// Returns the bytes of all bodies that the server has sent.
    pub(crate) fn sent(&self) -> u64 {
        let bytes = |line: &String| {
            let number = line
                .split("bytes=")
                .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            number.last().unwrap_or(0)
        };
        self.log().iter().map(bytes).sum()
    }
}

/// Returns true if FUSE, certtool and the simulator's compiler are available.
pub(crate) fn need_vsim() -> bool {
    need_fuse() && need("certtool") && need("go")
}

/// Returns true if FUSE, certtool and nginx are available.
pub(crate) fn need_nginx() -> bool {
    need_fuse() && need("certtool") && need("nginx")
}

/// Returns a password file for `password=+FILE`.
pub(crate) fn password_file(scratch: &Scratch) -> String {
    let path = scratch.write("password", format!("{PASSWORD}\n"));
    format!("password=+{}", path.display())
}

/// Builds the simulator once, and returns its path. Other test processes wait for the one that builds.
fn vsim_program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let built = PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let folder = test.ancestors().nth(3).unwrap().join("vsim");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("vsim");
        fs::create_dir_all(folder.join("go/src")).unwrap();
        let lock = File::create(folder.join("lock")).unwrap();
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        let link = folder.join("go/src/vsim");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&sources, &link).unwrap();
        let program = folder.join("vsim");
        Cmd::new("go")
            .args(["build", "-o"])
            .arg(&program)
            .arg("vsim")
            .dir(&folder)
            .env("GO111MODULE", "off")
            .env("CGO_ENABLED", "0")
            .env("GOCACHE", folder.join("cache").to_str().unwrap())
            .env("GOPATH", &format!("{}:/usr/share/gocode", folder.join("go").display()))
            .deadline(Duration::from_secs(600))
            .run()
            .ok();
        program
    });
    built.clone()
}

/// Creates a self-signed certificate for 127.0.0.1, and returns the paths of it and its key.
fn certificate(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let (certificate, key) = (scratch.path("server.pem"), scratch.path("server.key"));
    let template = scratch.write(
        "server.info",
        "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\nca\ntls_www_server\nsigning_key\nexpiration_days = 2\n",
    );
    let key_args = ["--generate-privkey", "--key-type=ecdsa", "--outfile"];
    Cmd::new("certtool").args(key_args).arg(&key).run().ok();
    let mut signed = Cmd::new("certtool")
        .args(["--generate-self-signed", "--template"])
        .arg(&template);
    signed = signed
        .arg("--load-privkey")
        .arg(&key)
        .arg("--outfile")
        .arg(&certificate);
    signed.run().ok();
    (certificate, key)
}

/// One request to a [`Fake`] server.
pub(crate) struct Ask {
    /// Number of the request, from 0.
    pub(crate) number: usize,
    pub(crate) path: String,
    /// First and last byte of the range; none for a request without one.
    pub(crate) range: Option<(usize, usize)>,
    /// All header lines.
    pub(crate) head: String,
}

/// Server whose answers a test chooses. It speaks plain HTTP, closes each connection after one answer, and ends with the
/// test process.
pub(crate) struct Fake {
    pub(crate) port: u16,
}

impl Fake {
    /// Starts a server that calls `answer` for each request, with the connection to write to.
    pub(crate) fn start(answer: impl Fn(&Ask, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = std::sync::Arc::new(answer);
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                let answer = std::sync::Arc::clone(&answer);
                std::thread::spawn(move || {
                    let mut stream = stream;
                    if let Some(ask) = read_request(&mut stream, number) {
                        answer(&ask, &mut stream);
                    }
                });
            }
        });
        Self { port }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }
}

fn read_request(stream: &mut TcpStream, number: usize) -> Option<Ask> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let range = head.lines().find_map(|line| {
        let range = line.to_ascii_lowercase();
        let (first, last) = range.strip_prefix("range: bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    });
    let path = head.split(' ').nth(1)?.to_owned();
    Some(Ask {
        number,
        path,
        range,
        head,
    })
}

/// Sends a right answer for the range.
pub(crate) fn send_right(ask: &Ask, content: &[u8], stream: &mut TcpStream) {
    let (first, last) = ask.range.expect("a range");
    let last = last.min(content.len() - 1);
    let head = head_of(first, last, content.len());
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&content[first..=last]);
}

/// Returns the head of a 206.
pub(crate) fn head_of(first: usize, last: usize, total: usize) -> String {
    format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{total}\r\nContent-Length: {}\r\n\
         ETag: \"one\"\r\nConnection: close\r\n\r\n",
        last - first + 1
    )
}
