"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const NAMES = {
    network: "network", limits: "limits", lock: "another process", hash: "digests", disk: "disk",
    decode: "decoding", device: "device", rest: "other code", wait: "waiting",
  };
  const PHASES = {
    request: "request, until the answer", network: "receiving", hash: "digest", write: "writing", read: "reading",
    publish: "sync and rename", backoff: "pause before a retry", rate_limit: "waiting for the server's limit",
    limit_rate: "waiting, because of limit_rate",
    lock: "waiting for another process", open_device: "opening the device", decode: "decoding", place: "making tensors", finish: "waiting for the device",
    wait: "waiting for workers", manifest: "manifest", memory_limit: "waiting, because of memory_limit",
    staging: "staging memory", buffers: "making buffers", copy: "copying to the device", shader: "making a shader",
    wait_buffers: "waiting for buffers",
  };
  const total = Math.max(data.total * 1e6, 1); // µs, as all times of events
  const [THREAD, PHASE, START, LENGTH, FILE, BYTES, DETAIL, PARTS] = [0, 1, 2, 3, 4, 5, 6, 7];

  // --- texts

  const add = (parent, tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    parent.append(element);
    return element;
  };
  // As words.py writes them, for the texts above; only times under 1 ms are in µs here.
  const number = (count, decimals = 0) =>
    count.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  const digits = (value) => String(Number(value.toPrecision(3)));
  const brief = (us) =>
    us >= 999500 ? `${digits(us / 1e6)} s` : us >= 999.5 ? `${digits(us / 1e3)} ms` : `${us.toFixed(0)} µs`;
  const time = (us) => {
    const seconds = Math.round(us / 1e6);
    return us < 99.5e6 ? brief(us) : `${number(Math.floor(seconds / 60))} min ${seconds % 60} s`;
  };
  const size = (bytes) => {
    for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (bytes >= unit) return `${number(bytes / unit, 1)} ${name}`;
    }
    return `${number(bytes)} B`;
  };
  const rate = (bytes, us) => {
    if (!(us > 0 && bytes > 0)) return "–";
    const found = (bytes * 1e6) / us;
    return found >= 2 ** 20 ? `${number(found / 2 ** 20, 1)} MiB/s` : `${size(found)}/s`;
  };

  $("title").textContent = data.title;
  $("headline").textContent = data.headline;
  $("headline").hidden = !data.headline;
  if (data.outcome === "failed") $("error").textContent = `The load failed. ${data.error}`;
  if (data.outcome === "stopped") $("error").textContent = "The load was stopped before its end.";
  $("error").hidden = !$("error").textContent;
  for (const line of data.advice) add($("advice"), "li", line);
  for (const [label, value] of data.facts) {
    const pair = add($("facts"), "div");
    add(pair, "dt", label);
    add(pair, "dd", value);
  }
  $("remark").textContent = data.remark;
  for (const row of data.rates) {
    const cells = add($("rates").tBodies[0], "tr");
    row.forEach((text, index) => add(cells, "td", text, index === 1 ? "number" : ""));
  }
  $("rates-section").hidden = data.rates.length === 0;
  $("footer").textContent = `Made by ndcache ${data.version}. URLs are shown without passwords and queries.`;

  // --- where the time went; the legend shows and hides groups

  const hidden = new Set();
  for (const [group, seconds] of data.shares) {
    if (seconds < data.total / 1000) continue;
    const words = `${NAMES[group]}: ${time(seconds * 1e6)}, ${((seconds / (data.total || 1)) * 100).toFixed(0)} %`;
    const bar = add($("shares"), "div");
    bar.style.cssText = `flex: ${(seconds / data.total) * 1000}; background: var(--${group})`;
    bar.title = words;
    const button = add(add($("legend"), "li"), "button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    add(button, "i").style.background = `var(--${group})`;
    add(button, "span", words);
    button.addEventListener("click", () => {
      if (!hidden.delete(group)) hidden.add(group);
      button.setAttribute("aria-pressed", String(!hidden.has(group)));
      draw();
    });
  }

  // --- events by lane, each as deep as the events around it

  const lanes = data.threads.map(() => []);
  for (const event of data.events) lanes[event[THREAD]].push(event);
  const depths = new Map();
  for (const lane of lanes) {
    const ends = [];
    lane.sort((one, other) => one[START] - other[START] || other[LENGTH] - one[LENGTH]);
    for (const event of lane) {
      while (ends.length && ends[ends.length - 1] <= event[START]) ends.pop();
      depths.set(event, Math.min(ends.length, 2));
      ends.push(event[START] + event[LENGTH]);
    }
  }

  // --- shards: what happened to each

  const shards = data.shards.map(([file, bytes, origin, checked]) => ({
    file, bytes, origin, checked, name: data.files[file], start: Infinity, end: 0, busy: 0, received: 0,
  }));
  const byFile = new Map(shards.map((shard) => [shard.file, shard]));
  for (const event of data.events) {
    const shard = byFile.get(event[FILE]);
    if (!shard) continue;
    if (data.phases[event[PHASE]][0] === "buffers") continue; // made ahead, long before
    shard.start = Math.min(shard.start, event[START]);
    shard.end = Math.max(shard.end, event[START] + event[LENGTH]);
    if (data.phases[event[PHASE]][0] === "network") {
      shard.busy += event[LENGTH];
      shard.received += event[BYTES];
    }
  }

  // --- the two drawings share one time axis

  let [from, to] = [0, total];
  let matching = null; // the files that the filter leaves, or null for all
  let chosen = -1;
  const LANE = lanes.length > 40 ? 9 : 16, GAP = 3, AXIS = 20; // many processes have many lanes
  const left = data.threads.some((name) => name.length > 11) ? 96 : 78;
  const charts = [["network", "network", 90], ["read", "disk", 45]] // phase, group, height
    .filter(([phase]) => data.events.some((event) => event[BYTES] && data.phases[event[PHASE]][0] === phase));
  $("throughput").hidden = charts.length === 0;
  $("shards-section").hidden = shards.length === 0;
  if (data.workers && data.threads.filter((name) => name.startsWith("worker")).length > data.workers) {
    $("hint").textContent += " A worker that syncs a file lets another one begin, so there are more than max_workers.";
  }
  if (data.threads.includes("helper 1.2")) $("hint").textContent += " Helper 1.2 is worker 2 of helper process 1.";

  const prepare = (canvas, height) => {
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = `${LANE > 9 ? 12 : 11}px system-ui, sans-serif`;
    return [context, width];
  };
  const colors = () => {
    const style = getComputedStyle(document.documentElement), found = {};
    for (const name of [...Object.keys(NAMES), "text", "soft", "line", "card", "accent"]) {
      found[name] = style.getPropertyValue(`--${name}`).trim();
    }
    return found;
  };
  const isShown = (event) => !hidden.has(data.phases[event[PHASE]][1]);
  const isBright = (event) => (chosen >= 0 ? event[FILE] === chosen : matching === null || matching.has(event[FILE]));

  function binned(phase, bins, step) {
    const sums = new Float64Array(bins);
    for (const event of data.events) {
      if (!event[BYTES] || data.phases[event[PHASE]][0] !== phase || !isShown(event) || !isBright(event)) continue;
      const length = Math.max(event[LENGTH], 1), start = event[START] - from, end = start + length;
      const last = Math.min(Math.floor(end / step), bins - 1);
      for (let bin = Math.max(Math.floor(start / step), 0); bin <= last; bin++) {
        const part = Math.min(end, (bin + 1) * step) - Math.max(start, bin * step);
        if (part > 0) sums[bin] += (event[BYTES] * part) / length;
      }
    }
    return sums;
  }

  function drawThroughput(color) {
    if (!charts.length) return;
    const bottom = charts.reduce((sum, [, , height]) => sum + height + GAP, -GAP);
    const [context, width] = prepare($("throughput"), bottom + AXIS);
    const inner = width - left, bins = Math.max(Math.min(Math.floor(inner / 3), 400), 1);
    const step = (to - from) / bins;
    let above = 0;
    for (const [phase, group, height] of charts) {
      const sums = binned(phase, bins, step), top = Math.max(...sums), floor = above + height;
      context.fillStyle = color.soft;
      context.fillText(top ? rate(top, step) : "no bytes", 0, above + 12);
      context.fillText(NAMES[group], 0, above + 27);
      context.strokeStyle = color.line;
      context.strokeRect(left + 0.5, above + 0.5, inner - 1, height - 1);
      if (top) {
        context.beginPath();
        context.moveTo(left, floor);
        sums.forEach((sum, bin) => {
          const y = floor - (sum / top) * (height - 4);
          context.lineTo(left + (bin / bins) * inner, y);
          context.lineTo(left + ((bin + 1) / bins) * inner, y);
        });
        context.lineTo(width, floor);
        context.globalAlpha = 0.35;
        context.fillStyle = context.strokeStyle = color[group];
        context.fill();
        context.globalAlpha = 1;
        context.stroke();
      }
      above = floor + GAP;
    }
    drawAxis(context, width, bottom, color);
  }

  function drawAxis(context, width, y, color) {
    const inner = width - left, rough = (to - from) / Math.max(inner / 64, 1), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    context.fillStyle = color.soft;
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) {
      const x = left + ((tick - from) / (to - from)) * inner, words = tick ? brief(tick) : "0";
      context.fillRect(x, y, 1, 4);
      const wide = context.measureText(words).width;
      context.fillText(words, Math.min(Math.max(x - wide / 2, left), width - wide), y + 16);
    }
  }

  function drawWaterfall(color) {
    const [context, width] = prepare($("waterfall"), lanes.length * (LANE + GAP) + AXIS);
    const inner = width - left, scale = inner / (to - from);
    lanes.forEach((lane, index) => {
      const y = index * (LANE + GAP);
      context.fillStyle = color.soft;
      context.fillText(data.threads[index], 0, y + (LANE > 9 ? 12 : 9));
      context.fillStyle = color.line;
      context.fillRect(left, y + LANE, inner, 1);
      for (const event of lane) {
        const start = event[START], end = start + event[LENGTH];
        if (end < from || start > to || !isShown(event)) continue;
        const x = left + Math.max(start - from, 0) * scale, depth = depths.get(event);
        const wide = Math.max((Math.min(end, to) - Math.max(start, from)) * scale, 0.7);
        context.globalAlpha = isBright(event) ? 1 : 0.12;
        const top = y + (depth * LANE) / 4;
        let rest = LANE - (depth * LANE) / 4;
        const whole = rest;
        for (const [phase, part] of event[PARTS]) { // what it did at the same time, below
          const group = data.phases[phase][1];
          if (hidden.has(group)) continue;
          context.fillStyle = color[group];
          context.fillRect(x, top + rest - whole * part, Math.min(wide, width - x), whole * part);
          rest -= whole * part;
        }
        context.fillStyle = color[data.phases[event[PHASE]][1]];
        context.fillRect(x, top, Math.min(wide, width - x), rest);
      }
      context.globalAlpha = 1;
    });
    drawAxis(context, width, lanes.length * (LANE + GAP), color);
  }

  function draw() {
    const color = colors();
    drawThroughput(color);
    drawWaterfall(color);
    $("shown").textContent = from > 0 || to < total ? `${time(from)} to ${time(to)}` : `${time(total)} in all`;
  }

  function show(start, end) {
    const length = Math.min(Math.max(end - start, 20), total);
    from = Math.min(Math.max(start, 0), total - length);
    to = from + length;
    draw();
  }
  const zoom = (factor) => show((from + to) / 2 - ((to - from) / 2) * factor, (from + to) / 2 + ((to - from) / 2) * factor);
  const move = (part) => show(from + (to - from) * part, to + (to - from) * part);
  $("in").addEventListener("click", () => zoom(0.5));
  $("out").addEventListener("click", () => zoom(2));
  $("back").addEventListener("click", () => move(-0.5));
  $("on").addEventListener("click", () => move(0.5));
  $("all").addEventListener("click", () => { choose(-1); show(0, total); });

  // --- pointing, and dragging

  const at = (canvas, x) => from + ((x - canvas.getBoundingClientRect().left - left) / (canvas.clientWidth - left)) * (to - from);

  function find(x, y) {
    const box = $("waterfall").getBoundingClientRect(), lane = lanes[Math.floor((y - box.top) / (LANE + GAP))];
    if (!lane || x - box.left < left) return null;
    const moment = at($("waterfall"), x), near = ((to - from) / (box.width - left)) * 3;
    let found = null;
    for (const event of lane) {
      if (event[START] - near > moment) break;
      if (event[START] + event[LENGTH] + near < moment || !isShown(event)) continue;
      if (!found || depths.get(event) > depths.get(found) || (depths.get(event) === depths.get(found) && event[LENGTH] <= found[LENGTH])) found = event;
    }
    return found;
  }

  function tell(event, x, y) {
    const tip = $("tip");
    tip.hidden = !event;
    if (!event) return;
    const phase = data.phases[event[PHASE]][0], lines = [`${PHASES[phase] || phase}, ${time(event[LENGTH])}`];
    if (event[FILE] >= 0) lines.push(data.files[event[FILE]]);
    for (const [part, fraction] of event[PARTS]) {
      const name = data.phases[part][0];
      lines.push(`of it ${PHASES[name] || name}: ${time(event[LENGTH] * fraction)}`);
    }
    if (event[BYTES]) lines.push(`${size(event[BYTES])}, ${rate(event[BYTES], event[LENGTH])}`);
    if (event[DETAIL] >= 0 && data.details[event[DETAIL]]) lines.push(data.details[event[DETAIL]]);
    lines.push(`${data.threads[event[THREAD]]}, at ${time(event[START])}`);
    tip.textContent = lines.join("\n");
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(Math.min(x + 14, window.innerWidth - box.width - 8), 8)}px`;
    tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(y - box.height - 12, 8) : y + 18}px`;
  }

  let dragged = null;
  for (const canvas of [$("waterfall"), $("throughput")]) {
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse") dragged = { canvas, x: event.clientX };
      else tell(canvas.id === "waterfall" ? find(event.clientX, event.clientY) : null, event.clientX, event.clientY);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && canvas.id === "waterfall") tell(find(event.clientX, event.clientY), event.clientX, event.clientY);
    });
    canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tell(null); });
    canvas.addEventListener("dblclick", () => show(0, total));
  }
  window.addEventListener("pointerup", (event) => {
    if (dragged && Math.abs(event.clientX - dragged.x) > 5) {
      const ends = [at(dragged.canvas, dragged.x), at(dragged.canvas, event.clientX)].sort((one, other) => one - other);
      show(Math.max(ends[0], 0), Math.min(ends[1], total));
    }
    dragged = null;
  });
  window.addEventListener("scroll", () => tell(null), { passive: true });

  // --- the table of shards

  const took = (shard) => (shard.end ? shard.end - shard.start : 0);
  const COLUMNS = [
    ["shard", (shard) => shard.name, (shard) => shard.name, "name"],
    ["size", (shard) => shard.bytes, (shard) => size(shard.bytes), "number"],
    ["from", (shard) => shard.origin, (shard) => shard.origin || "–", ""],
    ["start", (shard) => shard.start, (shard) => (shard.end ? time(shard.start) : "–"), "number wide"],
    ["took", took, (shard) => (shard.end ? time(took(shard)) : "–"), "number"],
    ["received at", (shard) => shard.received / (shard.busy || 1), (shard) => rate(shard.received, shard.busy), "number wide"],
    ["checked by", (shard) => shard.checked, (shard) => (shard.checked === "size" ? "size alone" : shard.checked || "–"), "wide"],
  ];
  const PAGE = 100;
  let order = null, isDown = false, rows = shards, shownRows = 0;
  const compare = (one, other) => (typeof one === "string" ? one.localeCompare(other, undefined, { numeric: true }) : one - other);

  COLUMNS.forEach(([label, key, , name]) => {
    const button = add(add($("shards").tHead.rows[0], "th", undefined, name === "name" ? "" : name), "button", label);
    button.type = "button";
    button.addEventListener("click", () => {
      isDown = order === key ? !isDown : false;
      order = key;
      for (const other of $("shards").tHead.querySelectorAll("button")) delete other.dataset.order;
      button.dataset.order = isDown ? "down" : "up";
      list();
    });
  });

  function list() {
    const text = $("filter").value.trim().toLowerCase(), origin = $("origin").value;
    rows = shards.filter((shard) => (!text || shard.name.toLowerCase().includes(text)) && (origin === "*" || shard.origin === origin));
    matching = text || origin !== "*" ? new Set(rows.map((shard) => shard.file)) : null;
    if (order) rows = rows.slice().sort((one, other) => compare(order(one), order(other)) * (isDown ? -1 : 1));
    $("shards").tBodies[0].replaceChildren();
    shownRows = 0;
    extend();
    $("count").textContent = `${rows.length === shards.length ? "" : `${number(rows.length)} of `}${number(shards.length)} shard${shards.length === 1 ? "" : "s"}`;
    draw();
  }

  function extend() {
    const lines = document.createDocumentFragment();
    for (const shard of rows.slice(shownRows, shownRows + PAGE)) {
      const line = add(lines, "tr", undefined, shard.file === chosen ? "chosen" : "");
      line.dataset.file = shard.file;
      for (const [, , words, name] of COLUMNS) add(line, "td", words(shard), name);
    }
    $("shards").tBodies[0].append(lines);
    shownRows = Math.min(shownRows + PAGE, rows.length);
    $("more").hidden = shownRows >= rows.length;
    $("more").textContent = `Show ${Math.min(PAGE, rows.length - shownRows)} more of ${rows.length - shownRows}`;
  }

  function choose(file) {
    chosen = file === chosen ? -1 : file;
    for (const line of $("shards").tBodies[0].rows) line.classList.toggle("chosen", Number(line.dataset.file) === chosen);
    const shard = byFile.get(chosen);
    if (shard && shard.end) show(shard.start - took(shard) / 4, shard.end + took(shard) / 4);
    else draw();
  }

  $("shards").tBodies[0].addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (line) choose(Number(line.dataset.file));
  });
  $("filter").addEventListener("input", list);
  $("origin").addEventListener("change", list);
  $("more").addEventListener("click", extend);
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  list();
})();
