// The versions of a variant: which one its name means, turned, and split between two.

import { at, call } from "./api.js";
import { badge, confirmed, field, h, toast } from "./dom.js";
import { bytes, date, nats, percent, plural, short } from "./format.js";

const COLUMNS = ["Version", "Registered", "Size", "KL", "Same token", "Digest"];
const FIRST_SHARE = 10; // percent, of a split that is not there yet

// `act` does something to the variant and tells how it went (variant.js); `changed` is called when the versions are known anew.
export function versionsTable(name, act, changed) {
  const split = h("div", { class: "notice split", hidden: true });
  const rows = h("tbody");
  const element = h("div", {}, split, h("div", { class: "scroll" }, h("table", { class: "stacked" },
    h("caption", { class: "unseen" }, "Versions"),
    h("thead", {}, h("tr", {}, ...COLUMNS.map((title) => h("th", { scope: "col", class: /Size|KL|Same/.test(title) && "number" }, title)), h("td", {}))),
    rows)));
  let known = null;

  const current = () => known?.data.find((one) => one.digest === known.current);
  const older = () => known?.data.find((one) => one.version < current().version);

  async function rollBack(target = older()) {
    if (!target) return;
    const text = `New requests for ${name} get version ${target.version} instead of ${current().version}; running ones finish as they are.`;
    if (await confirmed(`Turn ${name} to version ${target.version}?`, text, `Use version ${target.version}`)) {
      await act("POST", "rollback", `${name} is version ${target.version} now.`, { digest: target.digest });
    }
  }

  async function splitTo(canary) {
    const isSplit = known.canary === canary.digest;
    const share = h("input", { type: "number", min: 0.1, max: 99.9, step: 0.1, required: true, value: isSplit ? rounded(100 * known.share) : FIRST_SHARE });
    const hint = `Version ${current().version} answers the rest. Requests with the same “user” always get the same version.`;
    const body = field(`Percent of the requests that version ${canary.version} answers`, share, hint);
    if (await confirmed(`Split ${name} between two versions`, body, isSplit ? "Change" : "Split")) {
      const percents = share.valueAsNumber;
      await act("POST", "split", `Version ${canary.version} of ${name} answers ${percents} % of the requests now.`, { canary: canary.digest, share: rounded(percents / 100) });
    }
  }

  async function load() {
    try {
      known = await call("GET", `${at(name)}/versions`);
    } catch (error) {
      if (error.status !== 404) toast(error.message, true);
      known = null;
    }
    fill();
    changed();
  }

  function fill() {
    const focused = element.contains(document.activeElement) && document.activeElement.textContent;
    const canary = known?.data.find((one) => one.digest === known.canary);
    split.hidden = !canary;
    split.replaceChildren(...(!canary ? [] : [
      h("span", {}, `Version ${canary.version} answers ${percent(known.share)} of the requests, version ${current().version} the rest.`),
      button("Change share", () => splitTo(canary)),
      button("End split", () => act("DELETE", "split", `Version ${current().version} of ${name} answers all requests again.`)),
    ]));
    rows.replaceChildren(...(known?.data ?? []).map((one) => row(one, canary)));
    const buttons = [...element.querySelectorAll("button")];
    if (focused) (buttons.find((one) => one.textContent === focused) ?? buttons[0])?.focus();
  }

  function row(one, canary) {
    const isCurrent = one.digest === known.current;
    return h("tr", {},
      h("th", { scope: "row" }, `${one.version} `, isCurrent && badge("current", "good"), one === canary && badge(`canary, ${percent(known.share)} of requests`, "accent")),
      h("td", { "data-label": "Registered" }, date(one.created)),
      h("td", { "data-label": "Size", class: "number" }, bytes(one.size_bytes)),
      h("td", { "data-label": "KL", class: "number" }, nats(one.quality?.kl_mean)),
      h("td", { "data-label": "Same token", class: "number" }, percent(one.quality?.top1_agreement)),
      h("td", { "data-label": "Digest" }, h("code", { title: one.digest }, short(one.digest))),
      h("td", { class: "last" }, !isCurrent && [
        button(`Use version ${one.version}`, () => rollBack(one)), " ",
        one !== canary && button(`Split with version ${one.version}`, () => splitTo(one)),
      ]));
  }

  const button = (text, onclick) => h("button", { type: "button", class: "small", onclick }, text);
  return {
    element, load, rollBack,
    get count() { return plural(known?.data.length ?? 1, "version"); },
    get canRollBack() { return Boolean(older()); },
    isOld: (digest) => known !== null && known.current !== digest,
  };
}

const rounded = (number) => Number(number.toFixed(4)); // 0.07 * 100 is not quite 7
