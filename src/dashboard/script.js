// Asks for new contents each second, as long as the page is visible.
(function () {
  "use strict";
  var main = document.querySelector("main"), state = document.getElementById("state");
  var button = document.getElementById("pause"), isPaused = false, last = new Date();
  function say(text) { state.textContent = text; }
  function again(wait) { setTimeout(load, wait); }
  function load() {
    if (isPaused || document.hidden) { return again(300); }
    fetch("content?width=" + main.clientWidth, { cache: "no-store" }).then(function (answer) {
      if (!answer.ok) { throw new Error(answer.status); }
      return answer.text();
    }).then(function (text) {
      if (!isPaused) { main.innerHTML = text; }
      last = new Date();
      say("updates itself");
      again(1000);
    }).catch(function () {
      say("no answer since " + last.toLocaleTimeString() + ": the program has ended or is busy");
      again(2000);
    });
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    isPaused = !isPaused;
    button.textContent = isPaused ? "go on" : "pause";
    say(isPaused ? "paused" : "updates itself");
  });
  load();
})();
