"use strict";
// Keeps the part of the page that is marked data-fragment up to date. Replaces it only when the server's answer differs,
// and never under the operator's hands: not while the pointer is down or text is selected. Focus and opened details stay.

const PERIOD_MS = 2000;
const live = document.querySelector("[data-fragment]");
const connection = document.querySelector("[data-connection]");
const announcer = document.querySelector("[data-announcer]");
let skewMs = 0; // the server's clock minus ours
let pressed = false;

function age(seconds) {
  const s = Math.abs(Math.round(seconds));
  const words =
    s < 60 ? `${s} s`
    : s < 3600 ? `${Math.floor(s / 60)} min`
    : s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`
    : `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  return seconds < -0.5 ? `in ${words}` : `${words} ago`;
}

function tellTimes() {
  for (const element of document.querySelectorAll("time[data-age]")) {
    const at = new Date(element.dateTime);
    const words = age((Date.now() + skewMs - at.getTime()) / 1000);
    if (element.textContent !== words) element.textContent = words;
    if (!element.title) element.title = at.toLocaleString();
  }
}

function announce() {
  const words = live.querySelector("[data-announce]")?.textContent ?? "";
  if (announcer.textContent !== words) announcer.textContent = words;
}

function show(text, version) {
  const focused = live.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...live.querySelectorAll("details[open][id]")].map((element) => element.id);
  live.innerHTML = text;
  live.dataset.version = version;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  tellTimes();
  announce();
}

function inUse() {
  const selection = document.getSelection();
  return pressed || (selection && !selection.isCollapsed && live.contains(selection.anchorNode));
}

function tellConnection(state, words) {
  connection.dataset.connection = state;
  const element = connection.querySelector("[data-words]");
  if (element.textContent !== words) element.textContent = words;
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(live.dataset.fragment, {
      cache: "no-store",
      headers: { "If-None-Match": live.dataset.version },
      signal: AbortSignal.timeout(10000),
    });
    if (!answer.ok && answer.status !== 304) throw new Error(`status ${answer.status}`);
    const serverTime = Date.parse(answer.headers.get("Date"));
    if (!Number.isNaN(serverTime) && Math.abs(serverTime - Date.now()) > 2000) skewMs = serverTime - Date.now();
    if (answer.ok && !inUse()) show(await answer.text(), answer.headers.get("ETag"));
    tellConnection("live", "Live");
  } catch {
    tellConnection("lost", "Connection lost, trying again");
  }
}

async function follow() {
  await refresh();
  setTimeout(follow, PERIOD_MS);
}

document.addEventListener("pointerdown", () => { pressed = true; });
for (const end of ["pointerup", "pointercancel", "blur"]) window.addEventListener(end, () => { pressed = false; });
document.addEventListener("visibilitychange", () => { if (live) refresh(); });

tellTimes();
setInterval(tellTimes, 1000);
if (live) {
  announce();
  follow();
} else {
  tellConnection("none", "");
}
