// A small line chart of the last values, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 48;
const POINTS = 60;

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// `describe` returns the text of a value, for people and screen readers.
export function chart(label, describe) {
  const values = [];
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "line" });
  const element = svg("svg", {
    class: "chart",
    role: "img",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    "aria-label": `${label}: no values yet`,
  });
  element.append(area, line);
  return {
    element,
    add(value) {
      values.push(value);
      if (values.length > POINTS) values.shift();
      const top = Math.max(1, ...values);
      const x = (index) => (WIDTH * (index + POINTS - values.length)) / (POINTS - 1);
      const y = (each) => HEIGHT - 2 - ((HEIGHT - 4) * each) / top;
      const path = values.map((each, index) => `${x(index).toFixed(1)},${y(each).toFixed(1)}`);
      line.setAttribute("d", `M${path.join("L")}`);
      area.setAttribute("d", `M${x(0).toFixed(1)},${HEIGHT}L${path.join("L")}L${WIDTH},${HEIGHT}Z`);
      const most = Math.max(...values);
      element.setAttribute("aria-label", `${label}: ${describe(value)} now, at most ${describe(most)}`);
    },
  };
}
