// A notebook has keys of its own: arrows move between cells, 0 twice restarts the kernel, Enter
// begins to edit. While the focus is in `root` those without Ctrl are ours. JupyterLab hears them
// twice: at the document, before anything in it, where it passes over what has this attribute
// itself; and as they come up again.
function ownKeys(root) {
  const isOurs = (event) => root.contains(event.target) && !event.ctrlKey && !event.metaKey;
  const mark = (event) => {
    if (root.contains(event.target)) event.target.toggleAttribute("data-lm-suppress-shortcuts", isOurs(event));
  };
  const keep = (event) => {
    if (isOurs(event)) event.stopPropagation();
  };
  window.addEventListener("keydown", mark, true);
  root.addEventListener("keydown", keep);
  return () => window.removeEventListener("keydown", mark, true);
}

