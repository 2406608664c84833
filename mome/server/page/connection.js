// The requests of the page of `mome serve`, with the user's token.
"use strict";

const momeServer = (() => {
  let token = ""; // in memory only
  const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

  let whenRefused = () => {};

  // An answer of the server that is no success, with its status.
  class Refusal extends Error {
    constructor(message, status = 0) {
      super(message);
      this.status = status;
    }
  }

  async function ask(path, options = {}) {
    const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
    if (!answer.ok) throw refusal(answer.status, await answer.text());
    return answer;
  }

  function refusal(status, text) {
    if (status === 401) whenRefused();
    try {
      const { what, where, hint } = JSON.parse(text);
      return new Refusal([what, where && `in: ${where}`, hint && `try: ${hint}`].filter(Boolean).join("\n"), status);
    } catch {
      return new Refusal(`the server answers with status ${status}`, status);
    }
  }

  // Fields stand before the files, so that the server can refuse them before it has received the scan.
  function upload(body, onProgress, onStart) {
    return new Promise((done, failed) => {
      const request = new XMLHttpRequest();
      request.open("POST", "/jobs");
      for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
      request.upload.addEventListener("progress", (event) => onProgress(event.loaded / event.total));
      request.addEventListener("load", () => request.status === 202
        ? done(JSON.parse(request.responseText)) : failed(refusal(request.status, request.responseText)));
      request.addEventListener("error", () => failed(new Refusal("the server cannot be reached, or it refused the upload")));
      request.addEventListener("abort", () => failed(new Refusal("cancelled")));
      onStart(() => request.abort());
      request.send(body);
    });
  }

  async function* events(id) {
    const reader = (await ask(`/jobs/${id}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield JSON.parse(line);
    }
  }

  return { Refusal, ask, upload, events, headers, set token(value) { token = value; },
    set whenRefused(action) { whenRefused = action; } };
})();
