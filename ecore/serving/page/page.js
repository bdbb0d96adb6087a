// The conversation lives in this page alone: each request sends all of it, and the server keeps nothing.
const SHOWN = 5; // emotions beside an answer
const EXAMPLES = [
  ["I heard strange noises in the dark last night and I was so scared that I could not sleep."],
  ["My daughter won first prize at the science fair. I am so proud of her!"],
  ["All my friends moved away and I eat dinner alone in my empty apartment every night."],
  ["My dog died last week.", "I am so sorry to hear that. What happened?", "He was old and very ill. I miss him so much."],
];

const find = (id) => document.getElementById(id);
const log = find("log"), form = find("form"), box = find("message"), decoding = find("decoding");
let messages = []; // {role, content} of what was said and answered
let running = null; // aborts the answer that is being made

const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };

// An element with text in it: never markup, so that no message can become part of the page.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

// Requests ------------------------------------------------------------------------------------------------------

async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  let why = `the server answered with ${response.status}`;
  try { why = (await response.json()).error.message; } catch { /* it was no JSON */ }
  if (response.status === 401) why += "; open this page with #token=... behind its address";
  throw new Error(why);
}

// The objects of a stream of server-sent events; the last one says [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer was cut off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function settings() {
  const method = form.elements.method.value;
  const chosen = { method };
  for (const input of decoding.querySelectorAll("input")) {
    const only = input.closest("label").dataset.for;
    if ((only && only !== method) || input.value === "") continue;
    if (!input.checkValidity()) {
      decoding.open = true;
      input.focus();
      throw new Error(`${input.closest("label").textContent.trim()}: ${input.validationMessage}`);
    }
    chosen[input.name] = Number(input.value);
  }
  return chosen;
}

// What is shown -------------------------------------------------------------------------------------------------

function show(role, text) {
  const said = make("p", { class: "said" }, text);
  const who = role === "user" ? "You: " : "E-CORE: ";
  const item = make("li", { class: role }, make("div", {}, make("span", { class: "hidden" }, who), said));
  log.append(item);
  find("examples").hidden = true;
  item.scrollIntoView({ block: "nearest" });
  return { item, said };
}

function bars(shares, guides = false) {
  const list = make("ul", { class: guides ? "bars guide" : "bars" });
  for (const { name, share } of shares) {
    const fill = make("span", { class: "fill" });
    fill.style.width = `${100 * share}%`;
    list.append(make("li", {},
      make("span", {}, name),
      make("span", { class: "track", "aria-hidden": "true" }, fill),
      make("span", { class: "share" }, percent(share))));
  }
  return list;
}

function guidance(seen) {
  if (seen.strategy === "none") return [make("p", {}, "No emotion graph guides this model's answers.")];
  if (seen.strategy === "hard") {
    return [
      make("p", {}, "Hard strategy: Otsu's split keeps these emotions, and the answer hears no other."),
      make("p", { class: "guides" }, seen.relevant.join(", ")),
    ];
  }
  return [
    make("p", {}, "Soft strategy: the answer hears every emotion by this weight."),
    bars(seen.attention.slice(0, SHOWN), true),
    make("p", {}, "Co-occurring emotions: ", make("b", { class: "guides" }, seen.relevant.join(", "))),
  ];
}

// Words by emotions; blue adds to an emotion, orange (and a minus) takes from it.
function heatMap(graph) {
  const most = Math.max(...graph.word_edges.flat().map(Math.abs)) || 1;
  const head = make("tr", {}, make("th", { scope: "col" }, "word"));
  for (const name of graph.emotions) head.append(make("th", { scope: "col" }, name));
  const body = make("tbody");
  graph.words.forEach((word, row) => {
    const line = make("tr", {}, make("th", { scope: "row" }, word));
    for (const weight of graph.word_edges[row]) {
      const strength = weight / most;
      const cell = make("td", {}, Math.abs(strength) < 0.005 ? "0" : strength.toFixed(2).replace("-", "−"));
      cell.style.backgroundColor = `rgba(var(--${strength < 0 ? "minus" : "plus"}), ${0.75 * Math.abs(strength)})`;
      line.append(cell);
    }
    body.append(line);
  });
  const caption = make("caption", { class: "hidden" }, "Edges from emotions to words, over the largest");
  const table = make("table", { class: "map" }, caption, make("thead", {}, head), body);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Edges from emotions to words" }, table);
}

function beforeAndAfter(graph) {
  const head = make("tr");
  for (const name of ["emotion", "signal before", "signal after", "perceived before", "perceived after"]) {
    head.append(make("th", { scope: "col" }, name));
  }
  const body = make("tbody");
  graph.emotions.forEach((name, i) => {
    const numbers = [graph.signal_before[i].toFixed(2), graph.signal_after[i].toFixed(2),
      percent(graph.perceived_before[i]), percent(graph.perceived_after[i])];
    body.append(make("tr", {}, make("th", { scope: "row" }, name), ...numbers.map((n) => make("td", {}, n.replace("-", "−")))));
  });
  const table = make("table", {}, make("thead", {}, head), body);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Before and after correlation" }, table);
}

function explain(item, seen) {
  const beside = make("div", { class: "beside" }, make("h3", {}, "Perceived emotions"), bars(seen.emotions.slice(0, SHOWN)));
  const first = make("div", { class: "panel" }, make("h3", {}, "What guided the answer"), ...guidance(seen));
  const panels = make("div", { class: "panels" }, first);
  if (seen.graph) {
    first.append(make("h3", {}, "Before and after the emotions' correlation"),
      make("p", { class: "note" }, "The signal is the sum over words; after, emotions that go together have added to one another."),
      beforeAndAfter(seen.graph));
    panels.append(make("div", { class: "panel" }, make("h3", {}, "Words and the strongest emotions"),
      make("p", { class: "note" }, "What each word receives from each emotion, over the largest. A minus takes away."), heatMap(seen.graph)));
  }
  item.append(beside, make("details", {}, make("summary", {}, "Why: words, correlation, guidance"), panels));
}

function alarm(text) {
  find("alert").textContent = text;
  find("alert").hidden = !text;
}

function busy(aborter) {
  running = aborter;
  find("send").disabled = find("examples").inert = running !== null;
  find("stop").hidden = running === null;
  find("undo").disabled = find("reset").disabled = running !== null || messages.length === 0;
}

// The conversation ----------------------------------------------------------------------------------------------

async function say(text) {
  let chosen;
  try { chosen = settings(); } catch (error) { alarm(error.message); return; }
  alarm("");
  const asked = [...messages, { role: "user", content: text }];
  const mine = show("user", text);
  const { item, said } = show("assistant", "…");
  item.setAttribute("aria-busy", "true");
  busy(new AbortController());
  const signal = running.signal;
  try {
    const perceived = perceives ? post("emotions", { messages: asked, edges: true }, signal) : null;
    perceived?.catch(() => {}); // awaited below, where what went wrong is shown
    const response = await post("v1/chat/completions", { ...chosen, messages: asked, stream: true }, signal);
    let answer = "";
    for await (const event of events(response)) {
      answer += event.choices[0]?.delta.content ?? "";
      said.textContent = answer || "…";
    }
    const seen = perceived && (await (await perceived).json());
    if (seen) explain(item, seen);
    messages = [...asked, { role: "assistant", content: answer }];
    const heard = seen ? ` It perceived ${seen.emotions[0].name}, ${percent(seen.emotions[0].share)}.` : "";
    find("status").textContent = `E-CORE: ${answer}${heard}`;
    form.scrollIntoView({ block: "nearest" });
  } catch (error) {
    // What failed was not said: it is back in the box.
    mine.item.remove();
    item.remove();
    box.value = text;
    if (error.name !== "AbortError") alarm(error.message);
    find("examples").hidden = messages.length > 0;
  } finally {
    item.removeAttribute("aria-busy");
    busy(null);
    box.focus({ preventScroll: true });
  }
}

function send() {
  if (running) return;
  const text = box.value;
  if (!text.trim()) {
    alarm("Write something first.");
    box.focus();
    return;
  }
  box.value = "";
  say(text);
}

function take(count) {
  messages = count ? messages.slice(0, -count) : [];
  while (log.children.length > messages.length) log.lastElementChild.remove();
  find("examples").hidden = messages.length > 0;
  alarm("");
  busy(null);
  box.focus();
}

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
find("stop").addEventListener("click", () => running?.abort());
find("undo").addEventListener("click", () => {
  const last = messages.at(-2)?.content ?? "";
  take(2);
  box.value = last;
  find("status").textContent = "The last exchange is taken back.";
});
find("reset").addEventListener("click", () => { take(0); find("status").textContent = "A new conversation."; });
form.elements.method.addEventListener("change", choose);

function choose() {
  for (const label of decoding.querySelectorAll("[data-for]")) label.hidden = label.dataset.for !== form.elements.method.value;
}
choose();

for (const turns of EXAMPLES) {
  const button = make("button", { type: "button" }, turns.length > 1 ? turns.join(" — ") : turns[0]);
  button.addEventListener("click", () => {
    if (running) return;
    turns.slice(0, -1).forEach((content, i) => {
      const role = i % 2 ? "assistant" : "user";
      messages.push({ role, content });
      show(role, content);
    });
    say(turns.at(-1));
  });
  find("example-list").append(make("li", {}, button));
}

// Light and dark ------------------------------------------------------------------------------------------------

const root = document.documentElement, themeButton = find("theme");
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { themeButton.textContent = dark() ? "Light" : "Dark"; };
try { if (localStorage.theme) root.dataset.theme = localStorage.theme; } catch { /* storage is off */ }
nameTheme();
themeButton.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  try { localStorage.theme = root.dataset.theme; } catch { /* storage is off */ }
  nameTheme();
});

// What the server has -------------------------------------------------------------------------------------------

let perceives = true;
try {
  const get = async (path) => (await fetch(path, { headers })).json();
  const [models, emotions, defaults] = await Promise.all([get("v1/models"), get("emotions"), get("defaults")]);
  find("model").textContent = models.data[0].id;
  perceives = emotions.emotions.length > 0;
  for (const [name, value] of Object.entries(defaults)) {
    if (form.elements[name] && value !== null) form.elements[name].value = value;
  }
  choose();
} catch {
  alarm(token ? "The server did not answer as expected." : "The server did not answer as expected; if it has a token, open this page with #token=... behind its address.");
}
