// A vCenter or ESXi over TLS on loopback, from govmomi's simulator, with what the simulator lacks put in front of /folder:
// Basic login -> session cookie, sessions that end, 503 per excess request, 500 for locked names, per-request log.
package main

import (
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"flag"
	"fmt"
	"html"
	"io"
	"log"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
)

type gate struct {
	next         http.Handler
	user, pass   string
	sessionFor   time.Duration
	maxBusy      int64
	busy         int64
	doubleDecode bool
	esx          bool
	dir          string
	mu           sync.Mutex
	sessions     map[string]time.Time
	log          *log.Logger
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasPrefix(r.URL.Path, "/folder") {
		if r.URL.Path == "/sdk" {
			b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
			if err != nil {
				http.Error(w, err.Error(), 400)
				return
			}
			if strings.Contains(string(b), "<Logout ") {
				g.logout(w, r)
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(b))
		}
		g.next.ServeHTTP(w, r)
		return
	}
	t0 := time.Now()
	rec := &status{ResponseWriter: w, code: 200}
	defer func() {
		g.log.Printf("%s %s range=%q proto=%s peer=%s status=%d bytes=%d auth=%v cookie=%v ms=%d", r.Method, r.URL.RequestURI(), r.Header.Get("Range"), r.Proto, r.RemoteAddr, rec.code, rec.n, r.Header.Get("Authorization") != "", r.Header.Get("Cookie") != "", time.Since(t0).Milliseconds())
		rec.flush()
	}()
	if n := atomic.AddInt64(&g.busy, 1); g.maxBusy > 0 && n > g.maxBusy {
		atomic.AddInt64(&g.busy, -1)
		rec.Header().Set("Retry-After", "1")
		http.Error(rec, "Out of HTTP sessions: Limited to "+fmt.Sprint(g.maxBusy), 503)
		return
	}
	defer atomic.AddInt64(&g.busy, -1)
	ok := false
	// A real server wants the value back in its quotes.
	quoted := strings.Contains(r.Header.Get("Cookie"), `vmware_soap_session="`)
	if c, err := r.Cookie("vmware_soap_session"); err == nil && quoted {
		g.mu.Lock()
		until, known := g.sessions[strings.Trim(c.Value, `"`)]
		ok = known && time.Now().Before(until)
		g.mu.Unlock()
	}
	if u, p, has := r.BasicAuth(); !ok && has && u == g.user && p == g.pass {
		id := uuid.New().String()
		g.mu.Lock()
		g.sessions[id] = time.Now().Add(g.sessionFor)
		g.mu.Unlock()
		// the form that real servers send: the value is quoted
		rec.Header().Set("Set-Cookie", `vmware_soap_session="`+id+`"; Path=/; HttpOnly; Secure;`)
		ok = true
	}
	if !ok {
		rec.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
		http.Error(rec, "", 401)
		return
	}
	if strings.Contains(r.URL.Path, "locked") && r.Method == "GET" {
		http.Error(rec, "", 500)
		return
	}
	if g.doubleDecode { // vCenter decodes dcPath and dsName twice
		q := r.URL.Query()
		for _, k := range []string{"dcPath", "dsName"} {
			if v := q.Get(k); v != "" {
				if d, err := url.QueryUnescape(v); err == nil {
					q.Set(k, d)
				}
			}
		}
		r.URL.RawQuery = q.Encode()
	}
	if g.list(rec, r) {
		return
	}
	g.next.ServeHTTP(rec, r)
}

// list answers with the pages that real servers have and the simulator lacks, in the form of an ESXi: the datacenters, the
// datastores of one, and on an ESXi the folders of a datastore, with whole paths and queries in their links.
func (g *gate) list(w http.ResponseWriter, r *http.Request) bool {
	dc, ds := r.URL.Query().Get("dcPath"), r.URL.Query().Get("dsName")
	isRoot := strings.TrimRight(r.URL.Path, "/") == "/folder"
	// As real servers do: a blank is never a plus.
	encode := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	once := encode
	if g.doubleDecode {
		encode = func(s string) string { return once(once(s)) }
	}
	var links [][2]string
	switch {
	case isRoot && dc == "":
		for _, e := range simulator.Map.All("Datacenter") {
			name := e.Entity().Name
			links = append(links, [2]string{"/folder?dcPath=" + encode(name), name})
		}
	case isRoot && ds == "":
		if !hasName("Datacenter", dc) {
			http.Error(w, "", 500)
			return true
		}
		for _, e := range simulator.Map.All("Datastore") {
			name := e.Entity().Name
			links = append(links, [2]string{"/folder?dcPath=" + encode(dc) + "&dsName=" + encode(name), name})
		}
	case g.esx && hasName("Datastore", ds):
		rel := strings.Trim(strings.TrimPrefix(r.URL.Path, "/folder"), "/")
		entries, err := os.ReadDir(path.Join(g.dir, path.Clean("/"+rel)))
		if err != nil {
			return false
		}
		query := "?dcPath=" + encode(dc) + "&dsName=" + encode(ds)
		links = append(links, [2]string{"/folder" + query, "Parent Directory"})
		for _, e := range entries {
			slash := ""
			if e.IsDir() {
				slash = "/"
			}
			full := (&url.URL{Path: path.Join("/folder", rel, e.Name()) + slash}).EscapedPath()
			links = append(links, [2]string{full + query, e.Name() + slash})
		}
	default:
		return false
	}
	w.Header().Set("Content-Type", "text/html")
	fmt.Fprint(w, "<!DOCTYPE HTML><html><head><title>Index</title></head><body><h1>Index</h1><table>\n")
	for _, link := range links {
		fmt.Fprintf(w, "<tr><td><a href=\"%s\">%s</a></td><td align=\"right\">1</td></tr>\n", html.EscapeString(link[0]), html.EscapeString(link[1]))
	}
	fmt.Fprint(w, "</table></body></html>")
	return true
}

func hasName(kind, name string) bool {
	for _, e := range simulator.Map.All(kind) {
		if e.Entity().Name == name {
			return true
		}
	}
	return false
}

// logout ends the session of the cookie: the sessions of the gate are not those of the simulator.
func (g *gate) logout(w http.ResponseWriter, r *http.Request) {
	ended := false
	if c, err := r.Cookie("vmware_soap_session"); err == nil {
		id := strings.Trim(c.Value, `"`)
		g.mu.Lock()
		_, ended = g.sessions[id]
		delete(g.sessions, id)
		g.mu.Unlock()
	}
	g.log.Printf("LOGOUT ended=%v", ended)
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	fmt.Fprint(w, `<?xml version="1.0" encoding="UTF-8"?><soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"><soapenv:Body><LogoutResponse xmlns="urn:vim25"/></soapenv:Body></soapenv:Envelope>`)
}

// status counts what is sent. It holds back the last piece of a body until the request is logged: a client that has the whole
// answer finds the line in the log.
type status struct {
	http.ResponseWriter
	code int
	n    int64
	held []byte
}

func (s *status) WriteHeader(c int) { s.code = c; s.ResponseWriter.WriteHeader(c) }
func (s *status) Write(b []byte) (int, error) {
	if err := s.flush(); err != nil {
		return 0, err
	}
	s.held = append(s.held, b...)
	s.n += int64(len(b))
	return len(b), nil
}

func (s *status) flush() error {
	if len(s.held) == 0 {
		return nil
	}
	_, err := s.ResponseWriter.Write(s.held)
	s.held = s.held[:0]
	return err
}

func main() {
	esx := flag.Bool("esx", false, "a single ESXi instead of a vCenter")
	dir := flag.String("dir", "", "directory that becomes the datastore LocalDS_0")
	name := flag.String("name", "LocalDS_0", "name of that datastore")
	listen := flag.String("l", "127.0.0.1:0", "address to listen on")
	user := flag.String("u", "root", "")
	pass := flag.String("p", "secret", "")
	cert := flag.String("cert", "", "")
	key := flag.String("key", "", "")
	life := flag.Duration("session", 30*time.Minute, "life of a /folder session")
	max := flag.Int64("max", 0, "503 above so many requests at once")
	dbl := flag.Bool("double", false, "decode dcPath and dsName twice, as vCenter does")
	logf := flag.String("log", "/dev/stderr", "")
	flag.Parse()
	m := simulator.VPX()
	if *esx {
		m = simulator.ESX()
	}
	if err := m.Create(); err != nil {
		log.Fatal(err)
	}
	for _, e := range simulator.Map.All("Datastore") {
		ds := e.(*simulator.Datastore)
		if *dir != "" {
			ds.Info.GetDatastoreInfo().Url = *dir
			ds.Summary.Url = *dir
			ds.Name = *name
			ds.Summary.Name = *name
			ds.Info.GetDatastoreInfo().Name = *name
		}
		fmt.Printf("datastore %s at %s\n", ds.Name, ds.Info.GetDatastoreInfo().Url)
	}
	m.Service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*user, *pass)}
	m.Service.TLS = new(tls.Config)
	if *cert != "" {
		c, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			log.Fatal(err)
		}
		m.Service.TLS.Certificates = []tls.Certificate{c}
	}
	m.Service.TLS.NextProtos = []string{"h2", "http/1.1"}
	s := m.Service.NewServer()
	lf, err := os.OpenFile(*logf, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0600)
	if err != nil {
		log.Fatal(err)
	}
	s.Config.Handler = &gate{next: s.Config.Handler, user: *user, pass: *pass, sessionFor: *life, maxBusy: *max, doubleDecode: *dbl, esx: *esx, dir: *dir, sessions: map[string]time.Time{}, log: log.New(lf, "", log.Lmicroseconds)}
	fmt.Printf("ready %s sha1 % X\n", s.URL, sha1.Sum(s.Certificate().Raw))
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	<-sig
	m.Remove()
}
