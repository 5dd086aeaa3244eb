"use strict";
// Telemetry is other people's text. It reaches the page through textContent and style properties only, never as markup.

const main = document.getElementById("main");
const status = document.getElementById("status");
const input = document.getElementById("wanted");
const REFRESH_MS = 2000;
let timer = 0;
let shown = 0;

function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}
// Control and direction characters would let a name pretend to be something else.
const clean = (text) => String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  (character) => "\\u" + character.codePointAt(0).toString(16).padStart(4, "0"));
const text = (value, name = "span", className = "") => element(name, className ? { class: className } : {}, clean(value));
const link = (label, target) => element("a", { href: target }, clean(label));
const ns = (value) => BigInt(value);
const milliseconds = (from, to) => Number(to - from) / 1e6;
const took = (ms) => (ms >= 1000 ? (ms / 1000).toFixed(2) + " s" : ms.toFixed(ms < 10 ? 2 : 1) + " ms");
const moment = (value) => new Date(Number(ns(value) / 1000000n));
const clock = (value) => {
  const at = moment(value);
  return Number.isNaN(at.getTime()) ? "?" : at.toTimeString().slice(0, 8) + "." + String(at.getMilliseconds()).padStart(3, "0");
};
const day = (value) => (Number.isNaN(moment(value).getTime()) ? "?" : moment(value).toLocaleString([], { dateStyle: "medium", timeStyle: "long" }));
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const traceLink = (id) => "#/trace/" + encodeURIComponent(id);

// An attribute may be a map, whose own toString the sender chose: only a text or a number is a word of the page.
const word = (attributes, name) => (["string", "number"].includes(typeof attributes[name]) ? attributes[name] : "");

function title(span) {
  const http = word(span.attributes, "http.request.method");
  const where = ["http.route", "url.path", "url.full"].map((name) => word(span.attributes, name)).find(Boolean) || "";
  return http ? `${http} ${where}` : span.name;
}
// The name of a CLIENT span is the method alone: a URL has too many values to be one.
const target = (span) => String(word(span.attributes, "url.full")).replace(/^[^:]*:\/\/[^/?#]*/, "").replace(/[?#].*$/s, "");
const httpStatus = (span) => word(span.attributes, "http.response.status_code") || "";
const failed = (span) => span.failed || httpStatus(span) >= 500;

async function get(path) {
  const response = await fetch(path, { headers: { accept: "application/json" } });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response.json();
}

function summary(trace) {
  const entry = trace.entry;
  const bad = trace.errors > 0 || (entry && failed(entry));
  return element("li", { class: "trace" },
    link(entry ? title(entry) : "log lines only", traceLink(trace.trace_id)), " ",
    entry && httpStatus(entry) ? text(httpStatus(entry), "span", bad ? "bad" : "") : "",
    bad ? text(" failed", "span", "bad") : "", " ",
    text(`${entry ? took(milliseconds(ns(entry.start_ns), ns(entry.end_ns))) + " · " : ""}${day(trace.start_ns)}`, "span", "soft"),
    element("div", {}, text("request id ", "span", "soft"), text(trace.request_ids.join(", ") || "none", "span", "id")),
    element("div", { class: "soft" }, clean(`${trace.services.join(" → ")} · ${count(trace.spans, "span")} · ${count(trace.logs, "log line")}`)));
}

function facts(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [name, value] of pairs) list.append(text(name, "dt"), text(value, "dd", "id"));
  return list;
}

// Parents before children, siblings by start; what no root leads to (a cycle) comes last.
function rows(spans) {
  const ids = new Set(spans.map((span) => span.span_id));
  const children = new Map();
  const roots = [];
  for (const span of spans) {
    if (ids.has(span.parent_id) && span.parent_id !== span.span_id) {
      if (!children.has(span.parent_id)) children.set(span.parent_id, []);
      children.get(span.parent_id).push(span);
    } else roots.push(span);
  }
  const seen = new Set();
  const found = [];
  for (const root of [...roots, ...spans]) {
    const stack = [[0, root]];
    while (stack.length) {
      const [depth, span] = stack.pop();
      if (seen.has(span.span_id)) continue;
      seen.add(span.span_id);
      found.push([depth, span]);
      for (const child of (children.get(span.span_id) || []).slice().reverse()) stack.push([depth + 1, child]);
    }
  }
  return found;
}

const values = (attributes) => Object.entries(attributes).map(([key, value]) => [key, typeof value === "string" ? value : JSON.stringify(value)]);

function details(span) {
  const box = element("div", { class: "more" }, facts([["service", span.service], ["kind", span.kind], ["span id", span.span_id],
    ...(span.status_message ? [["status", span.status_message]] : []), ...values(span.attributes)]));
  for (const event of span.events) {
    const rest = { ...event.attributes };
    const stack = word(rest, "exception.stacktrace");
    if (stack) delete rest["exception.stacktrace"];
    box.append(text(event.name, "strong", event.name === "exception" ? "bad" : ""), facts(values(rest)));
    if (stack) box.append(text(stack, "pre"));
  }
  for (const other of span.links) box.append(element("p", {}, "linked to ", link(other.trace_id, traceLink(other.trace_id))));
  return box;
}

function waterfall(spans) {
  const begin = spans.reduce((least, span) => (ns(span.start_ns) < least ? ns(span.start_ns) : least), ns(spans[0].start_ns));
  const end = spans.reduce((most, span) => (ns(span.end_ns) > most ? ns(span.end_ns) : most), ns(spans[0].end_ns));
  const total = Number(end - begin) || 1;
  const list = element("ul", { class: "plain" });
  for (const [depth, span] of rows(spans)) {
    const bar = element("span", { class: failed(span) ? "bar failed" : "bar" });
    bar.style.left = (Number(ns(span.start_ns) - begin) / total) * 100 + "%";
    bar.style.width = (Number(ns(span.end_ns) - ns(span.start_ns)) / total) * 100 + "%";
    const label = element("span", {}, text(span.service, "strong"), " " + clean(span.kind === "CLIENT" ? `→ ${span.name} ${target(span)}` : span.name), " ",
      failed(span) ? text(`${httpStatus(span) || ""} failed`, "span", "bad") : text(httpStatus(span), "span", "soft"));
    label.style.paddingLeft = Math.min(depth, 12) + "rem";
    const box = element("details", { class: "span" }, element("summary", {}, label, element("span", { class: "track", "aria-hidden": "true" }, bar),
      text(took(milliseconds(ns(span.start_ns), ns(span.end_ns))), "span", "took")));
    // Filled when opened: a trace may have thousands of spans.
    box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(details(span)); });
    list.append(element("li", {}, box));
  }
  return list;
}

function logLines(logs) {
  const list = element("ul", { class: "plain" });
  for (const line of logs) {
    const bad = /^(error|fatal|critical)/i.test(line.severity);
    const body = element("span", { class: "body" }, clean(line.body));
    const stack = word(line.attributes, "exception.stacktrace");
    if (stack) body.append(element("details", {}, element("summary", {}, clean(word(line.attributes, "exception.type") || "traceback")), text(stack, "pre")));
    list.append(element("li", { class: "line" }, text(clock(line.time_ns), "span", "soft"), text(line.severity, "span", bad ? "bad" : "soft"), text(line.service, "strong"), body));
  }
  return list;
}

function story(trace) {
  const entry = trace.spans.find((span) => span.span_id === trace.entry);
  const article = element("article", {});
  article.append(text(entry ? `${title(entry)} ${httpStatus(entry)}` : "Log lines only", "h2", entry && failed(entry) ? "bad" : ""));
  article.append(facts([["request id", trace.request_ids.join(", ") || "none"], ["trace id", trace.trace_id],
    ...(entry ? [["took", took(milliseconds(ns(entry.start_ns), ns(entry.end_ns)))], ["at", day(entry.start_ns)], ["service", entry.service]] : [])]));
  if (trace.cause) {
    const { service, place, type, message, fatal } = trace.cause;
    article.append(element("section", { class: "cause" }, text(fatal ? "Cause" : "Handled on the way", "h2"),
      element("p", {}, text(service, "strong"), " ", text(place, "span", "place")), text(message ? `${type}: ${message}` : type, "p")));
  }
  if (trace.spans.length) article.append(text(`Waterfall (${count(trace.spans.length, "span")})`, "h2"), waterfall(trace.spans));
  article.append(text(`Log lines (${trace.logs.length})`, "h2"), trace.logs.length ? logLines(trace.logs) : text("None. Services send theirs with OTEL_LOGS_EXPORTER=otlp.", "p", "soft"));
  return article;
}

async function recent() {
  const { traces } = await get("/api/traces?limit=50");
  if (!traces.length) {
    return [text("Nothing received yet. Start a service that sends here:", "p"), text("otel-correlation run -- uvicorn main:app", "pre")];
  }
  return [text("Recent traces", "h2"), element("ul", { class: "plain" }, ...traces.map(summary))];
}

async function found(id) {
  const { traces } = await get("/api/find/" + encodeURIComponent(id));
  if (traces.length === 1) return [story(traces[0])];
  if (!traces.length) {
    return [text(`Nothing found for ${id}`, "h2"), text("The trace may not be sampled, not sent yet, or sent elsewhere; the oldest traces are dropped first. "
      + "An id of fewer than 16 characters never names a trace and is found by the attribute request_id only.", "p")];
  }
  return [text(`${traces.length} traces for ${id}`, "h2"), ...traces.map(story)];
}

async function show() {
  clearTimeout(timer);
  const mine = ++shown;
  const [, page, encoded] = /^#\/(\w*)\/?(.*)$/.exec(location.hash) || ["", "", ""];
  let again = false;
  let nodes;
  let name = "";
  try {
    const id = decodeURIComponent(encoded);
    name = id && clean(id) + " · ";
    if (page === "trace") {
      const trace = await get("/api/traces/" + encodeURIComponent(id));
      nodes = trace ? [story(trace)] : [text(`No trace ${id} here`, "h2")];
    } else if (page === "find") {
      input.value = id;
      nodes = await found(id);
    } else {
      nodes = await recent();
      again = true;
    }
    status.textContent = "";
  } catch (error) {
    status.textContent = `No answer from the server (${clean(error.message)}).`;
    again = !page;
  }
  if (mine !== shown) return;
  document.title = name + "otel-correlation";
  // A list that a person reads by keyboard must not move the focus away.
  if (nodes && !(again && main.contains(document.activeElement) && document.activeElement !== main)) main.replaceChildren(...nodes);
  if (again) timer = setTimeout(() => (document.hidden ? (timer = setTimeout(show, REFRESH_MS)) : show()), REFRESH_MS);
}

document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const target = "#/find/" + encodeURIComponent(input.value.trim());
  if (location.hash === target) show(); else location.hash = target;
});
addEventListener("hashchange", () => { show().then(() => main.focus({ preventScroll: true })); });
show();
