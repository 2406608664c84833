// The page of `mome serve`: uploads a scan with its prompts, follows the job, and shows its masks in the viewer.
"use strict";

(() => {
  const HIDDEN_FORMATS = ["json", "image", "nrrd", "viewer"]; // for programs
  const FORMAT_NAMES = { nifti: "NIfTI, one mask each", multilabel: "NIfTI, one map", dicom_seg: "DICOM SEG",
    dicom_seg_binary: "DICOM SEG for older archives", rtstruct: "RTSTRUCT", html: "HTML page", json: "JSON" };
  const part = (name) => document.querySelector(`[data-server="${name}"]`);
  let token = ""; // in memory only
  let files = [];
  let running = null; // {cancel} of the job that this page waits for
  const formatName = (name) => FORMAT_NAMES[name] || name.replaceAll("_", " ");

  const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

  class Refusal extends Error {}

  async function ask(path, options = {}) {
    const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
    if (!answer.ok) throw refusal(answer.status, await answer.text());
    return answer;
  }

  function refusal(status, text) {
    if (status === 401) login();
    try {
      const { what, where, hint } = JSON.parse(text);
      return new Refusal([what, where && `in: ${where}`, hint && `try: ${hint}`].filter(Boolean).join("\n"));
    } catch {
      return new Refusal(`the server answers with status ${status}`);
    }
  }

  function tell(text, failed = false) {
    part("status").textContent = text;
    part("status").classList.toggle("failed", failed);
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const button = (text, onClick) => {
    const made = element("button", { type: "button", className: "choice", textContent: text });
    made.addEventListener("click", onClick);
    return made;
  };

  // -- the request ----------------------------------------------------------------------------------------------

  function login() {
    part("login").hidden = false;
    part("request").hidden = true;
    part("token").focus();
  }

  async function open() {
    const able = await (await ask("/capabilities")).json();
    momeViewer.headers = headers();
    part("login").hidden = true;
    part("request").hidden = false;
    offer(able);
    const choice = element("select", { name: "model" }, element("option", { value: "" }, "chosen by the prompts"),
      ...Object.keys(able.models).map((name) => element("option", { value: name }, name)));
    choice.addEventListener("change", () => offer(able.models[choice.value] || able));
    part("model").replaceChildren(...(Object.keys(able.models).length > 1 ? [element("label", {}, "model", choice)] : []));
    const order = Object.keys(FORMAT_NAMES);
    const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
    const formats = able.formats.filter((name) => !HIDDEN_FORMATS.includes(name)).sort((a, b) => place(a) - place(b));
    part("formats").replaceChildren(...formats.map((name) => element("label", {},
      element("input", { type: "checkbox", value: name, checked: name === "nifti" }), formatName(name))));
  }

  function offer(able) {
    const labels = able.trained_labels.length ? able.trained_labels : able.labels;
    part("labels").replaceChildren(...labels.map((label) => button(label.replaceAll("_", " "), () => addPrompt(label))));
    tellMore();
  }

  // Some systems hide the bar of a list until it is scrolled; a list that is cut says so in words.
  function tellMore() {
    const list = part("labels");
    part("more").hidden = list.scrollHeight <= list.clientHeight;
    part("more").textContent = `${list.children.length} structures, scroll the list for more`;
  }
  new ResizeObserver(tellMore).observe(part("labels"));

  function addPrompt(label) {
    const text = part("prompts").value.trimEnd();
    const words = label.replaceAll("_", " ");
    if (!prompts().includes(words)) part("prompts").value = text ? `${text}\n${words}` : words;
  }

  const prompts = () => part("prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);

  function choose(chosen) {
    files = [...chosen];
    const bytes = files.reduce((sum, file) => sum + file.size, 0);
    const size = bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
    const name = files.length === 1 ? files[0].name : `${files.length} files`;
    part("chosen").textContent = files.length ? `${name}, ${size}` : "Drop a CT here, or choose files";
    part("drop").classList.toggle("full", files.length > 0);
    tell("");
  }

  // Fields stand before the files, so that the server can refuse them before it has received the scan.
  function upload(body, onProgress) {
    return new Promise((done, failed) => {
      const request = new XMLHttpRequest();
      request.open("POST", "/jobs");
      for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
      request.upload.addEventListener("progress", (event) => onProgress(event.loaded / event.total));
      request.addEventListener("load", () => request.status === 202
        ? done(JSON.parse(request.responseText)) : failed(refusal(request.status, request.responseText)));
      request.addEventListener("error", () => failed(new Refusal("the server cannot be reached, or it refused the upload")));
      request.addEventListener("abort", () => failed(new Refusal("cancelled")));
      running = { cancel: () => request.abort() };
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

  async function start() {
    if (!files.length) return tell("Choose a scan first.", true);
    if (!prompts().length) return tell("Name at least one structure.", true);
    const body = new FormData();
    prompts().forEach((prompt) => body.append("prompt", prompt));
    const model = part("model").querySelector("select");
    if (model && model.value) body.append("model", model.value);
    body.append("output", "viewer");
    part("formats").querySelectorAll("input:checked").forEach((box) => body.append("output", box.value));
    for (const field of part("options").querySelectorAll("input")) {
      if (field.type === "checkbox" ? field.checked : field.value.trim())
        body.append(field.name, field.type === "checkbox" ? "true" : field.value.trim());
    }
    files.forEach((file) => body.append("file", file));
    busy(true);
    try {
      progress("Uploading", 0);
      const job = await upload(body, (share) => progress("Uploading", share));
      running = { cancel: () => ask(`/jobs/${job.id}/cancel`, { method: "POST" }) };
      const entry = list(job, files.length === 1 ? files[0].name : `${files.length} files`);
      await follow(job.id, entry);
    } catch (error) {
      tell(error.message, true);
    } finally {
      busy(false);
    }
  }

  async function follow(id, entry) {
    let last = null;
    for await (const line of events(id)) {
      last = line;
      entry.state.textContent = line.state;
      if (line.state === "queued") progress(before(line.position), null);
      else if (line.progress) {
        const { phase, done, total } = line.progress;
        const words = { read: "Reading the scan", segment: "Segmenting", write: "Writing the masks" }[phase];
        progress(words, total ? done / total : null);
      }
    }
    if (!last || !["done", "failed", "cancelled"].includes(last.state)) throw new Refusal("the server stopped");
    finish(last, entry);
    if (last.state === "done") await show(id, entry);
    else tell(last.error ? [last.error.what, last.error.hint && `try: ${last.error.hint}`].filter(Boolean).join("\n")
      : "Cancelled.", last.state === "failed");
  }

  const before = (count) => (count ? `${count} ${count === 1 ? "job is" : "jobs are"} before this one` : "Waiting");

  async function show(id, entry) {
    tell("Loading the masks");
    const data = await (await ask(`/jobs/${id}/result?format=viewer`)).json();
    for (const item of part("list").children) item.classList.toggle("shown", item === entry.item);
    await momeViewer.show(data);
    tell("");
    document.querySelector('[data-part="structures"]').parentElement.scrollIntoView({ block: "nearest" });
  }

  function progress(words, share) {
    const bar = part("progress");
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
    tell(share === null ? `${words} …` : `${words}: ${Math.round(100 * share)} %`);
  }

  function busy(is) {
    part("start").disabled = is;
    part("cancel").hidden = part("progress").hidden = !is;
    if (!is) running = null;
  }

  // -- the results ----------------------------------------------------------------------------------------------

  function list(job, name) {
    part("jobs").hidden = false;
    const state = element("div", { className: "state", textContent: job.state });
    const buttons = element("div", { className: "buttons" });
    const item = element("li", { className: "job" }, element("div", { className: "what", textContent: name }), state, buttons);
    part("list").prepend(item);
    return { item, state, buttons };
  }

  function finish(job, entry) {
    if (job.state === "done") {
      const seconds = (job.finished - job.started).toFixed(1);
      const count = job.result.structures.length;
      // The labels of a group have one warning in common.
      const warnings = new Set(job.result.structures.map(({ warning }) => warning).filter(Boolean));
      const said = warnings.size + job.result.notes.length;
      entry.state.textContent = [`${count} ${count === 1 ? "structure" : "structures"}`, `${seconds} s`,
        said ? `${said} ${said === 1 ? "note" : "notes"}` : ""].filter(Boolean).join(", ");
      entry.buttons.append(button("Show", () => show(job.id, entry).catch((error) => tell(error.message, true))));
      for (const name of Object.keys(job.result.formats)) {
        if (["viewer", "image", "nrrd"].includes(name)) continue;
        entry.buttons.append(button(formatName(name), () => download(job.id, name)));
      }
    }
    entry.buttons.append(button("Delete", () => remove(job.id, entry)));
  }

  async function download(id, format) {
    try {
      const answer = await ask(`/jobs/${id}/result?format=${format}`);
      const name = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition"))[1];
      const url = URL.createObjectURL(await answer.blob());
      element("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    } catch (error) {
      tell(error.message, true);
    }
  }

  async function remove(id, entry) {
    try {
      await ask(`/jobs/${id}`, { method: "DELETE" });
    } catch (error) {
      tell(error.message, true);
    }
    entry.item.remove();
    part("jobs").hidden = !part("list").children.length;
  }

  // -- events ---------------------------------------------------------------------------------------------------

  const emptyStage = document.querySelector('[data-part="wait"]');
  emptyStage.textContent = "Choose a CT and name the structures to segment.";
  part("login").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = part("token").value.trim();
    part("token").value = "";
    part("refused").textContent = "";
    open().then(() => tell(""), (error) => { part("refused").textContent = error.message; });
  });
  part("files").addEventListener("change", (event) => choose(event.target.files));
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault(); // a file that is dropped beside the field must not replace this page
      part("drop").classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files);
    });
  }
  part("start").addEventListener("click", start);
  part("cancel").addEventListener("click", () => running && running.cancel());
  open().catch((error) => tell(error.message, true));
})();
