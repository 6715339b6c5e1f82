"use strict";
// Polls status.json once a second. Everything from the network goes in as text, never as markup.

const MODES = { gpu_only: "GPU only", inline: "inline", asymmetric: "asymmetric", deferred: "deferred" };
const POINTS = 120;

function make(tag, attributes, ...children) {
  const svg = ["svg", "path"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(1) + "M";
  if (value >= 1e4) return Math.round(value / 1e3) + "k";
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

function percent(share) { return Math.round(share * 100) + "%"; }

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? Math.round(value * 1000) + " ms" : value.toFixed(value < 10 ? 2 : 1) + " s";
}

function card(name, value, unit) {
  return make("div", { class: "card" }, make("div", { class: "name" }, name),
    make("div", { class: "value" }, value, unit ? make("small", {}, " " + unit) : null));
}

// Lines over the last two minutes; gaps where nothing was measured. lines: [{key, label, color}]
function graph(name, history, lines, format) {
  const values = lines.flatMap((line) => history.map((point) => point[line.key])).filter((v) => v !== null);
  const top = Math.max(...values, 1e-9);
  const svg = make("svg", { viewBox: `0 0 ${POINTS - 1} 100`, preserveAspectRatio: "none", role: "img", "aria-label": name },
    make("path", { d: `M0 98h${POINTS}`, class: "floor" }));
  for (const line of lines) {
    let path = "", pen = "M";
    history.forEach((point, place) => {
      const value = point[line.key];
      if (value === null) { pen = "M"; return; }
      const x = POINTS - history.length + place, y = (98 - 94 * (value / top)).toFixed(1);
      path += pen === "M" ? `M${x} ${y}h.5` : `L${x} ${y}`;
      pen = "L";
    });
    svg.append(make("path", { d: path || "M0 98", class: "c-" + line.color }));
  }
  const last = history[history.length - 1];
  const key = make("div", { class: "key" }, make("span", { class: "title" }, name));
  for (const line of lines) {
    key.append(make("span", {}, make("b", { class: "c-" + line.color }), line.label + " " + format(last[line.key])));
  }
  key.append(make("span", { class: "top" }, "top " + format(values.length ? top : 0)));
  return make("div", { class: "card" }, key, svg);
}

function bar(parts) {
  const node = make("div", { class: "bar" });
  for (const [color, share] of parts) {
    const part = make("i", { class: "c-" + color });
    part.style.width = Math.min(Math.max(share, 0), 1) * 100 + "%";
    node.append(part);
  }
  return node;
}

function kv(tier, color, state) {
  if (!tier || !tier.total_tokens) return make("td", {}, make("small", {}, state === "off" ? "no host tier" : "–"));
  const share = tier.used_tokens / tier.total_tokens;
  const note = state && state !== "up" && state !== "off" ? " · " + state : "";
  return make("td", {}, bar([[color, share]]),
    make("small", {}, `${Math.round(share * 100)}% of ${number(tier.total_tokens)} tokens · ${tier.running} running${note}`));
}

function row(backend) {
  const modes = Object.entries(backend.modes || {}).filter(([, share]) => share > 0.001);
  const tiers = backend.tiers || {};
  const running = tiers.gpu ? tiers.gpu.running + tiers.host.running : "–";
  const told = modes.map(([mode, share]) => `${MODES[mode] || mode} ${Math.round(share * 100)}%`).join(" · ");
  return make("tr", { "data-address": backend.address },
    make("td", {}, backend.address, make("small", {}, backend.models.join(", "))),
    make("td", {}, make("span", { class: "state " + backend.state }, backend.state), make("small", { class: "problem", title: backend.problem }, backend.problem)),
    make("td", {}, String(running)),
    make("td", {}, backend.waiting === undefined ? "–" : String(backend.waiting)),
    make("td", {}, number(backend.tokens_per_second || 0)),
    kv(tiers.gpu, "gpu"), kv(tiers.host, "host", backend.host_tier),
    make("td", {}, bar(modes), make("small", {}, told || "idle"),
      told ? make("small", {}, `device ${percent(backend.device_busy)} busy, host ${percent(backend.host_busy)}; waits ${percent(backend.host_wait)}`) : null,
      backend.decision ? make("small", { title: backend.decision.why }, "decided: " + (MODES[backend.decision.mode] || backend.decision.mode)) : null),
    make("td", {}, `${backend.failures} / ${number(backend.calls)}`));
}

function show(data) {
  const last = data.history[data.history.length - 1];
  const up = data.backends.filter((backend) => backend.state === "up").length;
  document.getElementById("summary").textContent =
    `${up} of ${data.backends.length} backends up · version ${data.version}`;
  document.getElementById("clock").textContent = new Date(data.time * 1000).toLocaleTimeString();
  const waits = data.history.filter((point) => point.p95_seconds !== null).slice(-1)[0] || last;
  document.getElementById("figures").replaceChildren(
    card("On the GPU tier", number(last.running_gpu)), card("On the host tier", number(last.running_host)),
    card("Waiting", number(last.waiting)), card("Output", number(last.tokens_per_second), "tokens/s"),
    card("Calls", number(last.started), "a second"), card("First message, p95", seconds(waits.p95_seconds)));
  document.getElementById("graphs").replaceChildren(
    graph("First message", data.history, [{ key: "p50_seconds", label: "p50", color: "p50" }, { key: "p95_seconds", label: "p95", color: "p95" }], seconds),
    graph("Output tokens a second", data.history, [{ key: "tokens_per_second", label: "now", color: "all" }], number),
    graph("Requests", data.history, [{ key: "running_gpu", label: "GPU", color: "gpu" }, { key: "running_host", label: "host", color: "host" }, { key: "waiting", label: "waiting", color: "waiting" }], number));
  document.getElementById("backends").replaceChildren(...data.backends.map(row));
  const legend = document.getElementById("legend");
  legend.replaceChildren(...Object.entries(MODES).flatMap(([mode, name]) => [make("b", { class: "c-" + mode }), name]),
    make("b", { class: "c-idle" }), "idle");
}

async function poll() {
  try {
    const answer = await fetch("status.json", { cache: "no-store" });
    const data = await answer.json();
    if (data.history) show(data);
    document.body.classList.remove("stale");
    document.body.dataset.polls = String(Number(document.body.dataset.polls || 0) + 1);
  } catch (problem) {
    document.body.classList.add("stale");
    document.getElementById("summary").textContent = "the router does not answer";
  }
  setTimeout(poll, 1000);
}

poll();
