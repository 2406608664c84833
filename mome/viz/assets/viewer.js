// The viewer of a segmentation: three planes of the CT with its masks, their surfaces, and the list of structures.
//
// `momeViewer.show(data)` draws a result and may be called again with another one. `data` has:
//   ct       {base64} or {url}, a NIfTI file of HU, or null
//   layers   [{base64 or url, structures: [{id, name, color: [r, g, b], volume_ml, warning, order}]}], NIfTI files of
//            label ids; a layer holds structures that do not overlap; they are listed by `order`, where it is given
//   notes    sentences about the scan and the result
// `momeViewer.headers` is sent with requests for URLs, such as {Authorization: "Bearer …"}.
"use strict";

const momeViewer = (() => {
  const WINDOWS = [["Soft tissue", -160, 240], ["Lung", -1350, 150], ["Bone", -500, 1300]];
  const VIEWS = ["All", "Axial", "Coronal", "Sagittal", "3D"];
  const HALF = 0.5;
  const TILE = 0.49; // the side of a tile; the rest is a gap between tiles
  const part = (name) => document.querySelector(`[data-part="${name}"]`);
  const state = { headers: {}, structures: [], layers: [], token: 0, view: "All", window: 0 };
  let planes = null;
  let solid = null;

  // -- canvases ---------------------------------------------------------------------------------------------

  async function attach() {
    if (planes) return;
    const shared = { backColor: [0, 0, 0, 1], dragAndDropEnabled: false, loadingText: "", logLevel: "error" };
    planes = new niivue.Niivue({ ...shared, isRadiologicalConvention: true, multiplanarShowRender: 0,
      crosshairColor: [1, 0.83, 0, 0.75], crosshairWidth: 0.25,
      crosshairWidthUnit: "percent", crosshairGap: 3, fontColor: [1, 0.83, 0, 1],
      dragMode: niivue.DRAG_MODE.windowing, isCornerOrientationText: false, showAllOrientationMarkers: true,
      fontMinPx: 12, fontSizeScaling: 0.35 });
    solid = new niivue.Niivue({ ...shared, isOrientCube: true, show3Dcrosshair: false });
    await planes.attachToCanvas(part("planes"));
    await solid.attachToCanvas(part("solid"));
    solid.setSliceType(niivue.SLICE_TYPE.RENDER);
    solid.setRenderAzimuthElevation(160, 12);
    solid.setScale(0.85);
    planes.onLocationChange = tellPlace;
    placeViews();
  }

  function placeViews() {
    const { AXIAL, CORONAL, SAGITTAL } = niivue.SLICE_TYPE;
    const single = { Axial: AXIAL, Coronal: CORONAL, Sagittal: SAGITTAL }[state.view];
    const frame = part("solid-frame");
    frame.hidden = single !== undefined;
    const share = state.view === "3D" ? 1 : HALF;
    Object.assign(frame.style, { right: "0", bottom: "0", width: `${share * 100}%`, height: `${share * 100}%` });
    const tiles = single !== undefined
      ? [{ sliceType: single, position: [0, 0, 1, 1] }]
      : [{ sliceType: AXIAL, position: [0, 0, TILE, TILE] }, { sliceType: CORONAL, position: [HALF, 0, TILE, TILE] },
        { sliceType: SAGITTAL, position: [0, HALF, TILE, TILE] }];
    planes.setCustomLayout(tiles);
    solid.resizeListener();
    solid.drawScene();
  }

  // -- data -------------------------------------------------------------------------------------------------

  async function bytesOf(source) {
    if (source.base64) return Uint8Array.from(atob(source.base64), (letter) => letter.charCodeAt(0)).buffer;
    const answer = await fetch(source.url, { headers: state.headers });
    if (!answer.ok) throw new Error(`${source.url}: ${answer.status}`);
    return answer.arrayBuffer();
  }

  async function show(data) {
    const token = ++state.token; // a later call replaces this one
    const wait = part("wait");
    wait.hidden = false;
    wait.classList.remove("failed");
    wait.textContent = "Loading…";
    document.documentElement.dataset.state = "loading";
    try {
      await attach();
      await load(data, token);
      if (token !== state.token) return;
      document.documentElement.dataset.state = "ready";
    } catch (error) {
      if (token !== state.token) return;
      wait.hidden = false;
      wait.classList.add("failed");
      wait.textContent = planes && planes.gl ? `This result cannot be shown: ${error.message}`
        : "This browser shows no WebGL 2, which the planes need. Try another browser, or switch on its graphics.";
      document.documentElement.dataset.state = "failed";
    }
  }

  async function load(data, token) {
    const layers = data.layers || [];
    state.structures = layers.flatMap((layer, number) => layer.structures.map((structure) =>
      ({ ...structure, layer: number, visible: true, mesh: null })))
      .sort((one, other) => (one.order ?? 0) - (other.order ?? 0));
    listStructures();
    listNotes(data.notes || []);
    const files = await Promise.all([data.ct, ...layers].map((source) => source ? bytesOf(source) : null));
    if (token !== state.token) return;
    const volumes = [];
    if (files[0]) {
      const [, low, high] = WINDOWS[state.window];
      volumes.push(await niivue.NVImage.new(files[0], "ct.nii.gz", "gray", 1, null, low, high));
    }
    state.layers = [];
    for (const [number, layer] of layers.entries()) {
      const image = await niivue.NVImage.new(files[number + 1], `layer_${number}.nii.gz`, "", opacity());
      if (token !== state.token) return;
      image.setColormapLabel(tableOf(number));
      const dims = image.hdr.dims.slice(1, 4);
      state.layers.push({ image, dims, found: momeSurfaces.measure(image.img, dims) });
      volumes.push(image);
    }
    // Volumes and meshes are put in place together: NiiVue's own `addVolume` and `addMesh` draw after each of them.
    planes.volumes = volumes;
    planes.back = volumes[0] || null;
    planes.overlays = volumes.slice(1);
    planes.opts.atlasOutline = part("outline").checked ? 1 : 0;
    planes.updateGLVolume();
    goToBusiest();
    part("wait").hidden = true;
    await buildSurfaces(token);
  }

  async function buildSurfaces(token) {
    const label = part("solid-wait");
    while (solid.meshes.length) solid.removeMesh(solid.meshes[0]);
    for (const [number, structure] of state.structures.entries()) {
      label.textContent = `Surfaces: ${number} of ${state.structures.length}`;
      await new Promise((next) => setTimeout(next)); // the page stays usable meanwhile
      if (token !== state.token) return;
      structure.mesh = surfaceOf(structure);
    }
    label.textContent = "";
    solid.meshes = state.structures.map(({ mesh }) => mesh).filter(Boolean);
    solid.updateGLVolume();
    solid.drawScene();
  }

  function tableOf(number) {
    const structures = state.structures.filter((structure) => structure.layer === number);
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (const { id, name, color, visible } of structures) {
      table.I.push(id);
      table.R.push(color[0]);
      table.G.push(color[1]);
      table.B.push(color[2]);
      table.A.push(visible ? 255 : 0);
      table.labels.push(name);
    }
    return table;
  }

  function surfaceOf(structure) {
    const { image, dims, found } = state.layers[structure.layer];
    const entry = found.get(structure.id);
    if (!entry) return null;
    const { points, triangles } = momeSurfaces.surface(image.img, dims, image.hdr.affine, structure.id, entry);
    const colour = new Uint8Array([...structure.color, 255]);
    const mesh = new niivue.NVMesh(points, triangles, structure.name, colour, 1, structure.visible, solid.gl);
    mesh.meshShaderIndex = solid.meshShaderNameToNumber("Matte");
    return mesh;
  }

  // -- place ------------------------------------------------------------------------------------------------

  // The planes that cut the most structures; among equals, those that cut the largest shares of them.
  function goToBusiest() {
    const layer = state.layers.find(({ found }) => found.size > 0);
    if (!layer) return goToMiddle(); // all masks are empty; the crosshair may lie outside of this scan
    const all = state.layers.filter(({ dims }) => String(dims) === String(layer.dims));
    const voxel = layer.dims.map((size, axis) => {
      const scores = new Float64Array(size);
      for (const { planes: counts } of all.flatMap(({ found }) => [...found.values()])) {
        const most = counts[axis].reduce((a, b) => Math.max(a, b));
        counts[axis].forEach((count, plane) => { scores[plane] += count ? 1 + 0.5 * (count / most) : 0; });
      }
      return scores.indexOf(scores.reduce((a, b) => Math.max(a, b)));
    });
    goTo(layer, voxel);
  }

  function goToMiddle() {
    planes.scene.crosshairPos = [HALF, HALF, HALF];
    planes.createOnLocationChange();
    planes.drawScene();
  }

  function goTo({ image }, [i, j, k]) {
    const place = image.hdr.affine.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3]);
    planes.scene.crosshairPos = planes.mm2frac(place);
    planes.createOnLocationChange();
    planes.drawScene();
  }

  function goToStructure(structure) {
    const layer = state.layers[structure.layer];
    const entry = layer && layer.found.get(structure.id);
    if (entry) goTo(layer, momeSurfaces.middle(layer.image.img, layer.dims, structure.id, entry));
  }

  function tellPlace(location) {
    const parts = [];
    const hasCt = planes.volumes.length > state.layers.length;
    location.values.forEach(({ value }, number) => {
      if (hasCt && number === 0) {
        parts.unshift(`${Math.round(value)} HU`);
      } else {
        const layer = number - (hasCt ? 1 : 0);
        const hit = state.structures.find(({ id, layer: own }) => own === layer && id === value);
        if (hit) parts.push(words(hit.name));
      }
    });
    part("place").textContent = [placeInWords(location), ...parts].join(" · ");
  }

  function placeInWords({ mm }) {
    const names = [["L", "R"], ["P", "A"], ["I", "S"]];
    return [0, 1, 2].map((axis) => `${names[axis][mm[axis] < 0 ? 0 : 1]} ${Math.abs(mm[axis]).toFixed(0)}`).join("  ") + " mm";
  }

  // -- lists and controls ------------------------------------------------------------------------------------

  const words = (name) => name.replaceAll("_", " ");
  const opacity = () => Number(part("opacity").value) / 100;

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function listStructures() {
    part("structures").replaceChildren(...state.structures.map((structure) => {
      const box = element("input", { type: "checkbox", checked: true, title: "show or hide" });
      box.addEventListener("change", () => setVisible([structure], box.checked));
      structure.box = box;
      const swatch = element("span", { className: "swatch" });
      swatch.style.backgroundColor = `rgb(${structure.color.join(",")})`;
      const name = element("button", { type: "button", className: "name", textContent: words(structure.name) });
      name.addEventListener("click", () => goToStructure(structure));
      const shown = structure.volume_ml == null ? "" : `${structure.volume_ml.toFixed(1)} ml`;
      const volume = element("span", { className: "volume", textContent: shown });
      const isEmpty = structure.volume_ml === 0;
      return element("li", { className: isEmpty ? "structure empty" : "structure" }, box, swatch, name, volume);
    }));
    part("all").checked = true;
  }

  function listNotes(notes) {
    const warnings = [...new Set(state.structures.map(({ warning }) => warning).filter(Boolean))];
    part("messages").hidden = notes.length + warnings.length === 0;
    part("notes").replaceChildren(
      ...warnings.map((text) => element("li", { className: "warning", textContent: text })),
      ...notes.map((text) => element("li", { textContent: text })));
  }

  function setVisible(structures, visible) {
    for (const structure of structures) {
      structure.visible = visible;
      structure.box.checked = visible;
      if (structure.mesh) structure.mesh.visible = visible;
    }
    part("all").checked = state.structures.every((structure) => structure.visible);
    state.layers.forEach(({ image }, number) => image.setColormapLabel(tableOf(number)));
    planes.updateGLVolume();
    solid.drawScene();
  }

  function choices(name, labels, onChoice) {
    const buttons = labels.map((label, number) => {
      const button = element("button", { type: "button", className: "choice", textContent: label });
      button.setAttribute("aria-pressed", String(number === 0));
      button.addEventListener("click", () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        onChoice(number);
      });
      return button;
    });
    part(name).replaceChildren(...buttons);
  }

  function setWindow(number) {
    state.window = number;
    if (!planes || planes.volumes.length <= state.layers.length) return;
    [, planes.volumes[0].cal_min, planes.volumes[0].cal_max] = WINDOWS[number];
    planes.updateGLVolume();
  }

  function control() {
    choices("windows", WINDOWS.map(([name]) => name), setWindow);
    choices("views", VIEWS, (number) => { state.view = VIEWS[number]; if (planes) placeViews(); });
    part("all").addEventListener("change", (event) => setVisible(state.structures, event.target.checked));
    part("opacity").addEventListener("input", () => {
      state.layers.forEach(({ image }) => { image.opacity = opacity(); });
      if (planes) planes.updateGLVolume();
    });
    part("outline").addEventListener("change", (event) => planes && planes.setAtlasOutline(event.target.checked ? 1 : 0));
  }

  control();
  const data = JSON.parse(document.getElementById("mome-data").textContent);
  if (data) show(data);
  else part("wait").textContent = "";

  return { show, set headers(value) { state.headers = value; } };
})();
