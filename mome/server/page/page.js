// The page of `mome serve`: uploads a scan with its prompts, follows the job, and shows its masks in the viewer.
"use strict";

(() => {
  const HIDDEN_FORMATS = ["json", "image", "nrrd", "viewer"]; // for programs
  const FORMAT_NAMES = { nifti: "NIfTI, one mask each", multilabel: "NIfTI, one map", dicom_seg: "DICOM SEG",
    dicom_seg_binary: "DICOM SEG for older archives", rtstruct: "RTSTRUCT", html: "HTML page", json: "JSON" };
  const MOST_TRIES = 40; // to follow a job, about six minutes
  const LONGEST_PAUSE_MS = 10000;
  const { Refusal, ask, upload, events } = momeServer;
  const part = (name) => document.querySelector(`[data-server="${name}"]`);
  let files = [];
  let running = null; // {cancel} of the job that this page waits for
  const formatName = (name) => FORMAT_NAMES[name] || name.replaceAll("_", " ");

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
    momeViewer.headers = momeServer.headers();
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
      const job = await upload(body, (share) => progress("Uploading", share), (cancel) => { running = { cancel }; });
      await attend(job.id, list(job, files.length === 1 ? files[0].name : `${files.length} files`));
    } catch (error) {
      tell(error.message, true);
    } finally {
      busy(false);
    }
  }

  const hasEnded = (job) => job !== null && ["done", "failed", "cancelled"].includes(job.state);

  // Follows a job to its end. A connection that breaks, or a server that starts again, is waited for.
  async function follow(id, entry) {
    let last = null;
    for (let tries = 0; !hasEnded(last); tries++) {
      if (tries > MOST_TRIES) throw new Refusal("the server cannot be reached; the job may go on there");
      if (tries) {
        progress("The connection was lost, trying again", null);
        await new Promise((next) => setTimeout(next, Math.min(1000 * tries, LONGEST_PAUSE_MS)));
      }
      try {
        for await (const line of events(id)) {
          last = line;
          tries = 0;
          tellState(line, entry);
        }
      } catch (error) {
        if (error instanceof Refusal && error.status < 500) throw error; // the server has answered, no proxy
      }
    }
    finish(last, entry);
    if (last.state === "done") await show(id, entry);
    else tell(last.error ? [last.error.what, last.error.hint && `try: ${last.error.hint}`].filter(Boolean).join("\n")
      : "Cancelled.", last.state === "failed");
  }

  function tellState(job, entry) {
    entry.state.textContent = job.state;
    if (job.state === "queued") progress(before(job.position), null);
    else if (job.progress) {
      const { phase, done, total } = job.progress;
      const words = { read: "Reading the scan", segment: "Segmenting", write: "Writing the masks" }[phase];
      progress(words, total ? done / total : null);
    }
  }

  // Waits for a job with the page busy; one that cannot be followed can be looked at again, or deleted.
  async function attend(id, entry) {
    running = { cancel: () => ask(`/jobs/${id}/cancel`, { method: "POST" }).catch((error) => tell(error.message, true)) };
    entry.buttons.replaceChildren();
    try {
      await follow(id, entry);
    } catch (error) {
      if (!entry.buttons.children.length) {
        entry.buttons.append(button("Look again", () => resume(id, entry)), button("Delete", () => remove(id, entry)));
      }
      throw error;
    }
  }

  async function resume(id, entry) {
    if (part("start").disabled) return; // another job is waited for
    busy(true);
    try {
      await attend(id, entry);
    } catch (error) {
      tell(error.message, true);
    } finally {
      busy(false);
    }
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
    const scan = name.includes(".") ? name.replace(/\.(nii|nii\.gz|nrrd|nhdr|mha|zip|dcm)$/i, "") : "";
    return { item, state, buttons, scan };
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
        entry.buttons.append(button(formatName(name), () => download(job.id, name, entry.scan)));
      }
    }
    entry.buttons.append(button("Delete", () => remove(job.id, entry)));
  }

  // The name of the scan is known to the page alone; without it, the masks of two patients would have one name.
  async function download(id, format, scan) {
    try {
      const answer = await ask(`/jobs/${id}/result?format=${format}`);
      const name = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition"))[1];
      const url = URL.createObjectURL(await answer.blob());
      element("a", { href: url, download: scan ? `${scan}_${name}` : name }).click();
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
      if (error.status !== 404) return; // it is still there, and can be deleted later
    }
    entry.item.remove();
    part("jobs").hidden = !part("list").children.length;
  }

  // -- events ---------------------------------------------------------------------------------------------------

  const emptyStage = document.querySelector('[data-part="wait"]');
  emptyStage.textContent = "Choose a CT and name the structures to segment.";
  part("login").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    momeServer.token = part("token").value.trim();
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
  momeServer.whenRefused = login;
  open().catch((error) => tell(error.message, true));
})();
