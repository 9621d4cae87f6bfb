// State: the palette, one sense for each value, the dual and the first prompt shown. It lies in the address's hash.
// Every text comes from the file and is set as text, never as markup.

const at = (id) => document.getElementById(id);
const state = { palette: [], sense: [], joint: false, first: 0 };
let about;
let rows = [];
let asking = false;
let again = false;

const digits = (x, j) => x.toFixed(about.values[j].decimals).replace(/^-(0\.?0*)$/, "$1");
const minus = (text) => text.replace("-", "−");
const show = (x, j) => (x === null ? "–" : minus(digits(x, j)));
const brief = (x) => (x === null ? "–" : minus(Number(x.toPrecision(3)).toString()));

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function ends(j) {
  const [low, high] = about.values[j][state.joint ? "joint" : "per_prompt"];
  return high > low ? [low, high] : [low - 1, high + 1]; // a constant value
}

function share(x, j) {
  const [low, high] = ends(j);
  return Math.min(1, Math.max(0, (x - low) / (high - low)));
}

function buildRow(value, j) {
  const row = at("value").content.cloneNode(true).firstElementChild;
  const find = (name) => row.querySelector(name);
  const parts = {
    slider: find("[type=range]"), level: find(".level"), sense: find(".sense"), lam: find(".lam"), bar: find(".bar"),
    mean: find(".mean"), realised: find(".mark.realised"), reached: find(".reached"), least: find(".least"), most: find(".most"),
  };
  find("legend").textContent = find(".name").textContent = value.name;
  parts.slider.setAttribute("aria-label", `${value.name}: target`);
  parts.level.setAttribute("aria-label", `${value.name}: target, as a number`);
  parts.sense.setAttribute("aria-label", `${value.name}: at least, exactly or at most`);
  parts.slider.addEventListener("input", () => change(() => (state.palette[j] = Number(parts.slider.value))));
  parts.sense.addEventListener("change", () => change(() => (state.sense[j] = parts.sense.value)));
  parts.level.addEventListener("change", () => {
    if (parts.level.value !== "" && Number.isFinite(parts.level.valueAsNumber))
      change(() => (state.palette[j] = parts.level.valueAsNumber));
    else draw();
  });
  at("values").append(row);
  return parts;
}

function build() {
  at("source").textContent =
    `${about.source}: ${about.prompts.toLocaleString("en")} prompts × ${about.candidates.toLocaleString("en")} candidates`;
  document.title = `Palette · ${about.source}`;
  rows = about.values.map(buildRow);
  for (const [name, palette] of Object.entries(about.starts)) {
    const button = make("button", "", name === "mean" ? "base mean" : name.replace("q", "quantile ") + " %");
    button.type = "button";
    button.addEventListener("click", () => goTo(palette));
    button.dataset.start = name;
    at("starts").append(button);
  }
  at("joint").addEventListener("change", () => change(() => (state.joint = at("joint").checked)));
  const turn = (by) => change(() => (state.first = Math.min(Math.max(0, state.first + by), about.prompts - 1)));
  at("back").addEventListener("click", () => turn(-3));
  at("on").addEventListener("click", () => turn(3));
  at("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(at("command").textContent);
    at("copy").textContent = "copied";
    setTimeout(() => (at("copy").textContent = "copy"), 1500);
  });
}

const goTo = (palette) => change(() => (state.palette = [...palette]));

function change(how) {
  how();
  const hash = new URLSearchParams({ c: state.palette.join(",") });
  if (state.sense.some((x) => x !== ">=")) hash.set("sense", state.sense.join(","));
  if (state.joint) hash.set("dual", "joint");
  if (state.first) hash.set("from", state.first);
  history.replaceState(null, "", `#${hash.toString().replaceAll("%2C", ",")}`);
  draw();
  ask();
}

function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const m = about.values.length;
  const palette = (hash.get("c") ?? "").split(",").map((x) => (x === "" ? NaN : Number(x)));
  state.palette = palette.length === m && palette.every(Number.isFinite) ? palette : [...about.starts.mean];
  const sense = (hash.get("sense") ?? "").split(",");
  state.sense = sense.length === m && sense.every((x) => [">=", "==", "<="].includes(x)) ? sense : Array(m).fill(">=");
  state.joint = hash.get("dual") === "joint";
  const first = Number(hash.get("from") ?? 0);
  state.first = Number.isInteger(first) && first >= 0 && first < about.prompts ? first : 0;
  draw();
  ask();
}

function draw() {
  rows.forEach((row, j) => {
    const [low, high] = ends(j);
    const level = state.palette[j];
    row.slider.min = low;
    row.slider.max = high;
    row.slider.step = (high - low) / 400;
    row.slider.value = level;
    row.slider.setAttribute("aria-valuetext", show(level, j));
    if (document.activeElement !== row.level || row.level.valueAsNumber !== level) row.level.value = digits(level, j);
    row.sense.value = state.sense[j];
    row.least.textContent = show(low, j);
    row.most.textContent = show(high, j);
    row.mean.style.setProperty("--share", share(about.values[j].mean, j));
    row.mean.title = `base model's mean ${show(about.values[j].mean, j)}`;
  });
  at("joint").checked = state.joint;
  for (const button of at("starts").children)
    button.setAttribute("aria-pressed", about.starts[button.dataset.start].every((x, j) => x === state.palette[j]));
}

// One question at a time: while one is on its way the next waits, and only the latest is asked.
async function ask() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  document.body.classList.add("working");
  do {
    again = false;
    try {
      const reply = await fetch("solve", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(state),
      });
      const answer = await reply.json();
      if (answer.error) fail(answer.error);
      else if (!again) drawAnswer(answer);
    } catch {
      fail("fastalign palette-ui does not answer: was it ended?");
    }
  } while (again);
  asking = false;
  document.body.classList.remove("working");
  document.body.dataset.answers = 1 + Number(document.body.dataset.answers ?? 0);
}

function fail(line) {
  at("verdict").className = "verdict off";
  at("verdict").replaceChildren(line);
}

function drawAnswer(answer) {
  drawVerdict(answer);
  rows.forEach((row, j) => {
    const level = answer.levels[j];
    row.lam.replaceChildren("λ ", make("b", "", brief(answer.lambda[j])));
    row.reached.textContent = `realised ${show(level, j)}`;
    if (level === null) return;
    const [from, to] = [share(about.values[j].mean, j), share(level, j)];
    row.realised.style.setProperty("--share", to);
    row.bar.style.setProperty("--from", Math.min(from, to));
    row.bar.style.setProperty("--wide", Math.abs(to - from));
  });
  fact("kl", answer.kl === null ? "–" : answer.kl.toFixed(3), state.joint ? "nats, jointly" : "nats a prompt");
  fact("ess", answer.ess === null ? "–" : answer.ess.toFixed(1), `of ${answer.ess_of.toLocaleString("en")}`);
  const passes = `${answer.passes} ${answer.passes === 1 ? "pass" : "passes"}`;
  fact("ms", `${answer.ms.toFixed(answer.ms < 10 ? 1 : 0)} ms`, passes);
  at("brief").className = at("verdict").className.replace("verdict", "");
  const worth = `KL ${at("kl").firstChild.data.trim()}, ${at("ess").textContent} effective, ${at("ms").firstChild.data}`;
  at("brief").replaceChildren(make("b", "", answer.feasible ? "In reach" : "Out of reach"), ` · ${worth}`);
  at("command").textContent = answer.command;
  drawExamples(answer);
}

function fact(id, number, unit) {
  at(id).replaceChildren(`${number} `, make("small", "", unit));
}

function drawVerdict(answer) {
  const box = at("verdict");
  box.className = answer.feasible && !answer.thin ? "verdict" : "verdict off";
  if (answer.feasible) {
    const more = answer.unique ? "" : " Some values say the same: of all λ that serve, this is the smallest.";
    const thin = " But few effective samples are left: other candidates of this model may not reach it.";
    box.replaceChildren(make("b", "", "In reach."), (answer.thin ? thin : " No policy that reaches it is nearer to the model.") + more);
    return;
  }
  const { nearest, scaling, scaled, inward } = answer.beyond;
  const buttons = make("div", "buttons");
  const go = (text, palette, id) => {
    const button = make("button", "", text);
    button.type = "button";
    button.id = id;
    button.addEventListener("click", () => goTo(palette));
    buttons.append(button);
  };
  const levels = about.values.map((value, j) => `${value.name} ${show(nearest[j], j)}`).join(", ");
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  go("Go to what is shown", nearest, "nearest");
  if (scaling > 0.001) go(`Go ${percent(inward * scaling)} of the way`, scaled, "scaled");
  box.replaceChildren(
    make("b", "", "Out of reach:"),
    ` no reweighting of these candidates gives it. Shown is ${percent(inward)} of the way from the model's mean to the nearest that one can: ` +
      `${levels}. Straight towards the palette, ${percent(scaling)} of the way can be had.`,
    buttons,
  );
}

function card(what, candidate) {
  const box = make("div", "text");
  const label = make("div", "label", what);
  label.append(make("b", "", `${(100 * candidate.weight).toFixed(candidate.weight < 0.1 ? 1 : 0)} %`));
  box.append(label, make("p", "", candidate.text || "(empty)"), scores(candidate.rewards));
  return box;
}

function scores(rewards) {
  const line = make("div", "scores");
  line.append(...about.values.map((value, j) => make("span", "", `${value.name} ${show(rewards[j], j)}`)));
  return line;
}

function drawExamples(answer) {
  const last = answer.first + answer.examples.length;
  at("place").textContent = `${answer.first + 1}–${last} of ${about.prompts}`;
  at("back").disabled = answer.first === 0;
  at("on").disabled = last >= about.prompts;
  at("examples").replaceChildren(
    ...answer.examples.map((example) => {
      const article = at("example").content.cloneNode(true).firstElementChild;
      article.querySelector("h3").textContent = example.prompt;
      const picks = example.picked.filter((pick, k) => k === 0 || pick.weight >= 0.05);
      const draws = example.base.slice(0, picks.length);
      article.querySelector(".before").append(...draws.map((draw) => card("base model draws it with ", draw)));
      article.querySelector(".after").append(...picks.map((pick) => card("this policy picks it with ", pick)));
      return article;
    }),
  );
}

const reply = await fetch("values");
about = await reply.json();
build();
window.addEventListener("hashchange", readHash);
readHash();
