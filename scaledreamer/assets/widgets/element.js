// HTML elements, as all widgets make them.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  element.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own arrow keys
  return element;
}
