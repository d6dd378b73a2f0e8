"""A server that answers `huggingface_hub` as the hub does, from a dict of files."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class FakeHub:
  """Repositories over HTTP on this machine.

  Attributes:
    repositories: `{name: {revision: {path: bytes}}}`; a revision's commit is the hash of its content.
    contents: what was asked for with GET of a file: `(path, Range header or None)`.
    cut: `{path: n}`: the next reply with this file breaks off after n bytes.
    status: if set, what every request gets, as 503.
    gated: repositories whose files need a login.
  """

  def __init__(self):
    self.repositories, self.contents, self.cut, self.status, self.gated = {}, [], {}, None, set()
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_HEAD(self):
        hub.answer(self)

      def do_GET(self):
        hub.answer(self)

      def log_message(self, *_):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.server.server_port}"
    threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

  def close(self):
    self.server.shutdown()
    self.server.server_close()

  @staticmethod
  def commit(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

  def answer(self, request):
    path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path).strip("/")
    found = (re.fullmatch(r"api/models/(?P<name>[^/]+/[^/]+)(/(?P<kind>revision|tree)/(?P<revision>.+))?", path)
             or re.fullmatch(r"(?P<name>[^/]+/[^/]+)/(?P<kind>resolve)/(?P<revision>[^/]+)/(?P<file>.+)", path))
    if self.status:
      return self.reply(request, self.status)
    if not found or found["name"] not in self.repositories:
      return self.reply(request, 401, {"X-Error-Code": "RepoNotFound"})
    revisions = self.repositories[found["name"]]
    revisions = revisions | {self.commit(files): files for files in revisions.values()}
    files = revisions.get(found["revision"] or "main")
    if files is None:
      return self.reply(request, 404, {"X-Error-Code": "RevisionNotFound"})
    headers = {"X-Repo-Commit": self.commit(files)}
    if found["kind"] == "resolve":
      if found["name"] in self.gated:
        return self.reply(request, 403, {"X-Error-Code": "GatedRepo"})
      if found["file"] not in files:
        return self.reply(request, 404, headers | {"X-Error-Code": "EntryNotFound"})
      return self.send(request, found["file"], files[found["file"]], headers)
    if found["kind"] == "tree":
      tree = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
              for name, data in files.items()]
      return self.reply(request, 200, {}, json.dumps(tree).encode())
    info = {"id": found["name"], "sha": self.commit(files), "siblings": [{"rfilename": name} for name in files]}
    return self.reply(request, 200, {}, json.dumps(info).encode())

  def send(self, request, name, data, headers):
    asked, status, start = request.headers.get("Range"), 200, 0
    headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
    if asked:
      start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
      headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    if request.command == "GET":
      self.contents.append((name, asked))
    self.reply(request, status, headers, data[start:], self.cut.pop(name, None) if request.command == "GET" else None)

  def reply(self, request, status, headers=None, body=b"", cut=None):
    request.send_response(status)
    for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
      request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
      request.wfile.write(body[:cut])
      request.close_connection = cut is not None
