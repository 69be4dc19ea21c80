//! Listens in between two sites: a proxy that has the keys of both, and so sees in the clear what they
//! say.
//!
//! What is recorded is what lies in TLS, so a recording is of the wire as its peers see it, whatever
//! program speaks, also one of an older version; the programs themselves know nothing of it.
//!
//! Only for sites that a test has made: it reads their private keys.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName as Subject, ServerConfig,
    SignatureScheme, version,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// Whoever called.
    Caller,
    /// Whoever was called.
    Called,
}

/// What was said on one connection, in the order in which it came through.
pub type Heard = Vec<(Speaker, Vec<u8>)>;

/// Why nobody can listen in.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A site's key can't be read.
    #[error("cannot read the site key {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No certificate can be made of it.
    #[error("cannot make a certificate")]
    Certificate(#[source] rcgen::Error),
    /// It can't be used for TLS.
    #[error("cannot speak TLS")]
    Tls(#[source] rustls::Error),
    /// No port.
    #[error("cannot listen")]
    Listen(#[source] io::Error),
}

/// A proxy to one site, for one other site. It ends when it is dropped.
#[derive(Debug)]
pub struct Tap {
    addr: SocketAddr,
    connections: Arc<Mutex<Vec<Heard>>>,
    lets_through: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Tap {
    /// Listens for the site whose state lies in `caller`, in place of the one in `called`, which
    /// listens at `to`. A connection is cut off once `until` says so of what its caller has said so
    /// far; that has been passed on by then.
    pub async fn start(
        caller: &Path,
        called: &Path,
        to: SocketAddr,
        until: impl Fn(&[u8]) -> bool + Send + Sync + 'static,
    ) -> Result<Self, TapError> {
        let acceptor = TlsAcceptor::from(Arc::new(server(called)?));
        let connector = TlsConnector::from(Arc::new(client(caller)?));
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .map_err(TapError::Listen)?;
        let addr = listener.local_addr().map_err(TapError::Listen)?;
        let connections = Arc::new(Mutex::new(Vec::new()));
        let (lets_through, open) = watch::channel(true);
        let all = connections.clone();
        let until = Arc::new(until);
        let cut = lets_through.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if !*open.borrow() {
                    continue;
                }
                let index = {
                    let mut all = lock(&all);
                    all.push(Heard::new());
                    all.len() - 1
                };
                let (acceptor, connector) = (acceptor.clone(), connector.clone());
                let (all, until, cut, mut open) =
                    (all.clone(), until.clone(), cut.clone(), open.clone());
                tokio::spawn(async move {
                    let between = async {
                        let here = acceptor.accept(stream).await?;
                        let there = TcpStream::connect(to).await?;
                        // Names are no part of it.
                        let name = ServerName::IpAddress(to.ip().into());
                        let there = connector.connect(name, there).await?;
                        let (here, there) = (tokio::io::split(here), tokio::io::split(there));
                        let note = |speaker, bytes: &[u8]| {
                            let mut all = lock(&all);
                            all[index].push((speaker, bytes.to_vec()));
                            if speaker == Speaker::Caller {
                                let said = said_by(&all[index], Speaker::Caller);
                                return until(&said);
                            }
                            false
                        };
                        let up = async {
                            let over = pass(here.0, there.1, |b| note(Speaker::Caller, b)).await?;
                            if over {
                                // Whoever asks later is let through again by whoever runs this.
                                cut.send_replace(false);
                            }
                            io::Result::Ok(())
                        };
                        let down = pass(there.0, here.1, |b| note(Speaker::Called, b));
                        let (up, down) = tokio::join!(up, down);
                        up.and(down.map(drop))
                    };
                    // A connection that is lost, or cut, is what its ends make of it.
                    tokio::select! {
                        _ = between => {}
                        _ = open.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Ok(Self {
            addr,
            connections,
            lets_through,
            task,
        })
    }

    /// Where the caller finds it.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Whether it has cut a connection off: it takes no others until [`Self::mend`].
    pub fn is_cut(&self) -> bool {
        !*self.lets_through.borrow()
    }

    /// Lets connections through again.
    pub fn mend(&self) {
        self.lets_through.send_replace(true);
    }

    /// What was said so far, by connection.
    pub fn heard(&self) -> Vec<Heard> {
        lock(&self.connections).clone()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All that one side has said.
pub fn said_by(heard: &Heard, speaker: Speaker) -> Vec<u8> {
    let said = heard.iter().filter(|(by, _)| *by == speaker);
    said.flat_map(|(_, bytes)| bytes).copied().collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes on what comes, until `note` has had enough (true) or no more comes (false).
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    note: impl Fn(&[u8]) -> bool,
) -> io::Result<bool> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = from.read(&mut buffer).await?;
        let bytes = &buffer[..len];
        if bytes.is_empty() {
            to.shutdown().await?;
            return Ok(false);
        }
        let enough = note(bytes);
        to.write_all(bytes).await?;
        to.flush().await?;
        if enough {
            return Ok(true);
        }
    }
}

type Own = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// As the site itself makes it at each start.
fn own(site: &Path) -> Result<Own, TapError> {
    let path = site.join("site.key");
    let pem = std::fs::read_to_string(&path).map_err(|source| TapError::Key { path, source })?;
    let pair = KeyPair::from_pem(&pem).map_err(TapError::Certificate)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let certificate = params.self_signed(&pair).map_err(TapError::Certificate)?;
    let key = PrivatePkcs8KeyDer::from(pair.serialize_der());
    Ok((certificate.der().clone(), key.into()))
}

fn server(site: &Path) -> Result<ServerConfig, TapError> {
    let (certificate, key) = own(site)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .map_err(TapError::Tls)?
        .with_client_cert_verifier(Arc::new(Anybody))
        .with_single_cert(vec![certificate], key)
        .map_err(TapError::Tls)
}

fn client(site: &Path) -> Result<ClientConfig, TapError> {
    let (certificate, key) = own(site)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .map_err(TapError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_auth_cert(vec![certificate], key)
        .map_err(TapError::Tls)
}

/// Both sites are this test's, and each checks the other's key: the tap shows them.
#[derive(Debug)]
struct Anybody;

/// Both traits ask the same of signatures.
macro_rules! any_signature {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.3 only".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    };
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    any_signature!();
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[Subject] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    any_signature!();
}
