"use strict";
const data = JSON.parse(document.getElementById("data").textContent), tower = data.tower;
const bytes = text => {
  const letters = atob(text), result = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) result[at] = letters.charCodeAt(at);
  return result;
};
const dot = (a, b) => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
};
{% if tower %}
{% include "text_tower.js" %}
{% endif %}
const form = document.getElementById("ask"), input = document.getElementById("query");
const said = document.getElementById("said"), nearest = document.getElementById("nearest");
const rows = [...document.querySelectorAll(".search")];
const items = [...document.getElementById("pictures").content.children];
const embeds = Float32Array.from(new Int16Array(bytes(data.embeds).buffer), value => value / 32767);
const embedding = at => embeds.subarray(at * data.dim, (at + 1) * data.dim);

const show = (title, vector, most) => {
  const cosines = items.map((_, at) => dot(embedding(at), vector));
  const best = [...items.keys()].sort((a, b) => cosines[b] - cosines[a]).slice(0, most);
  nearest.querySelector("h2").textContent = title;
  nearest.querySelector("ul").replaceChildren(...best.map(at => {
    const item = items[at].cloneNode(true);
    item.querySelector("strong").textContent = cosines[at].toFixed(2);
    return item;
  }));
  nearest.hidden = false;
};
const filter = () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const query = row.querySelector("h2").textContent.toLowerCase();
    row.hidden = !words.every(word => query.includes(word));
  }
  const count = rows.filter(row => !row.hidden).length;
  nearest.hidden = true;
  said.textContent = count ? `${count} of ${rows.length} queries` :
    "No query on this page has these words; flipscale search MODEL FOLDER 'words' searches for any.";
};
const search = () => {
  const text = input.value.trim();
  for (const row of rows) row.hidden = Boolean(text);
  nearest.hidden = true;
  const vector = text && knows(text) && embed(text);
  if (vector) show(text, vector, data.top);
  said.textContent = text && !vector ? "The model knows no part of these words." : "";
};
const ask = tower ? search : filter;
let timer;
input.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(ask, 100);
});
form.addEventListener("submit", event => {
  event.preventDefault();
  ask();
});
document.addEventListener("click", event => {
  const figure = event.target.closest("figure button") && event.target.closest("figure");
  if (!figure) return;
  show("Most similar on this page", embedding(Number(figure.dataset.number)), data.top + 1);
  nearest.scrollIntoView({block: "start"});
});
form.hidden = false;
ask();
